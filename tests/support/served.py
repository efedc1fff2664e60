"""A cache server in this process or in its own, and engines that attach to it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.tierworker.client import TierClient
from kvlab.tierworker.link import Link
from kvlab.tierworker.messages import Opening, message_of
from tests.support.tiers import cache_server
from tests.tierworker.test_process import NAMESPACES, Tiers, until

ROOT = Path(__file__).parents[2]


class Attached(Tiers):
    def __init__(self, path, *, model="m"):
        opening = Opening([], "naive", None, [{"model": model, "fields": {"rank": 0}}])
        self._share(TierClient(opening, path=str(path)), seed=1)


@pytest.fixture
def server(tmp_path):
    with cache_server(tmp_path / "kvlab.sock", "64MiB") as server:
        yield server


@pytest.fixture
def engines(server):
    engines = [Attached(server.path), Attached(server.path)]
    yield engines
    for engine in engines:
        engine.client.close()


def connected(server):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(server.path))
    return sock


def opened(server):
    """A client's own link to the server, with its tiers open."""
    link = Link(connected(server))
    link.send(message_of(Opening([], "naive", None, NAMESPACES)))
    assert link.wait(20)
    return link


@pytest.fixture
def command(tmp_path):
    """``kvlab serve`` as people start it."""
    path = tmp_path / "run.sock"
    args = ["--memory", "32MiB", "--tier", f"file://{tmp_path}/kv?size=64MiB", "--listen", str(path)]
    started = []

    def start():
        line = [sys.executable, "-m", "kvlab", "serve", *args]
        started.append(subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}))
        until(path.exists)
        return path, started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
