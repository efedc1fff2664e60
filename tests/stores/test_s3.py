"""A bucket as a tier: the suite of all stores, against a real server."""

import itertools

import pytest

from kvlab.machine.s3_server import S3Server
from kvlab.stores import open_store
from kvlab.testing import StoreTests

PATIENT = "&timeout_ms=60000"
count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


class TestS3Store(StoreTests):
    persistent = True
    examples = 15  # each begins with a new prefix

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    def open(self, where, max_bytes):
        return open_store(self.server.url_of(f"{where.parent.name}/{where.name}") + PATIENT)
