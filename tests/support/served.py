"""A cache server in this process or in its own, and engines that attach to it."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvlab.sharedmemory import SharedSlots
from kvlab.stores import open_store
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.link import Link
from kvlab.tierworker.messages import Memory, Opening, message_of
from tests.tierworker.test_process import LAYERS, NAMESPACES, PAGE, SLOTS, Tiers, until

ROOT = Path(__file__).parents[2]


class Attached(Tiers):
    def __init__(self, path, *, model="m"):
        opening = Opening([], "naive", None, [{"model": model, "fields": {"rank": 0}}])
        self.client = TierClient(opening, path=str(path))
        self.shared = SharedSlots(SLOTS, LAYERS * PAGE)
        self.client.share(Memory(SLOTS, LAYERS, PAGE), self.shared)
        self.bytes = np.random.default_rng(1).integers(0, 256, self.shared.slots.shape, dtype=np.uint8)
        self.shared.slots[:] = self.bytes
        self.shared.owners[:] = 1
        self.answers = {}


@pytest.fixture
def server(tmp_path):
    server = CacheServer(open_store("memory://?size=64MiB&pinned=false"), tmp_path / "kvlab.sock")
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(60)
    assert not thread.is_alive()


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
