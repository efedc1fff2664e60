"""The worker as a process: what it loads, how it ends, and what is left when it or its engine is killed."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.sharedmemory import SharedSlots
from kvlab.stores import open_store
from kvlab.tierworker import client as client_module
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Fill, Memory, Opening, Write, runs_of

LAYERS, PAGE, SLOTS = 2, 4096, 32
NAMESPACES = [{"model": "m", "fields": {"rank": 0}}]


class Tiers:
    """A client with slots of random bytes."""

    def __init__(self, folder):
        self._share(TierClient(Opening([f"file://{folder}?size=64MiB"], "naive", None, NAMESPACES)), seed=0)

    def _share(self, client, *, seed):
        self.client = client
        self.shared = SharedSlots(SLOTS, LAYERS * PAGE)
        self.client.share(Memory(SLOTS, LAYERS, PAGE), self.shared)
        self.bytes = np.random.default_rng(seed).integers(0, 256, self.shared.slots.shape, dtype=np.uint8)
        self.shared.slots[:] = self.bytes
        self.shared.owners[:] = 1
        self.answers = {}

    def write(self, name, slots):
        self._ask(Write(self.client.next_id(), *self._place(name, slots), generation=1, after=0), self.client.write)

    def fill(self, name, slots):
        self._ask(Fill(self.client.next_id(), *self._place(name, slots)), self.client.fill)

    def _place(self, name, slots):
        return 0, "", name * 16, runs_of(slots), 0, 32

    def _ask(self, request, ask):
        def answered(message, _):
            self.answers[request.hash[:2]] = message and (message.get("ok") or message.get("tier"))

        self.answers.pop(request.hash[:2], None)
        ask(request, answered)

    def wait(self, *names):
        until(lambda: all(name in self.answers for name in names), self.client.poll)
        return [self.answers[name] for name in names]

    @property
    def pid(self):
        return self.client._worker.process.pid


def until(condition, poll=lambda: None):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        poll()
        time.sleep(0.002)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def tiers(tmp_path):
    tiers = Tiers(tmp_path)
    yield tiers
    tiers.client.close()


def test_slots_are_written_and_filled_again(tiers):
    tiers.write("aa", range(4))
    tiers.write("bb", [9, 4, 5, 7])
    assert tiers.wait("aa", "bb") == [True, True]
    tiers.shared.slots[:] = 0
    tiers.fill("aa", [20, 22, 21, 10])
    tiers.fill("bb", range(4))
    tiers.fill("cc", range(25, 29))
    assert tiers.wait("aa", "bb", "cc") == ["disk", "disk", ""]
    assert np.array_equal(tiers.shared.slots[[20, 22, 21, 10]], tiers.bytes[:4])
    assert np.array_equal(tiers.shared.slots[:4], tiers.bytes[[9, 4, 5, 7]])


def test_it_loads_no_torch_and_stays_small(tiers):
    until(lambda: tiers.client._is_open, tiers.client.poll)  # before, it may still be a copy of this process
    maps = Path(f"/proc/{tiers.pid}/maps").read_text()
    assert "numpy" in maps
    # Not torch's libgomp nor vLLM's libtcmalloc, which vLLM's CPU platform has every child preload.
    assert [line for line in maps.splitlines() if re.search(r"libtorch|libcuda|vllm/_C", line)] == []
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{tiers.pid}/status").read_text().splitlines())
    own = sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssFile"))
    assert own < 150 << 10


def test_killed_it_is_a_miss_and_comes_back(tiers, monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_WAIT_S", 0.01)
    tiers.client._wait_s = 0.01
    tiers.write("aa", range(4))
    assert tiers.wait("aa") == [True]
    for round_ in range(3):
        old = tiers.pid
        os.kill(old, signal.SIGKILL)
        tiers.fill("aa", range(10, 14))
        assert tiers.wait("aa")[0] in (None, "disk")
        until(lambda: tiers.client._is_open, tiers.client.poll)
        assert tiers.pid != old
        assert tiers.client.counters["tier_worker_restarts"] == round_ + 1
        tiers.shared.slots[10:14] = 0
        tiers.fill("aa", range(10, 14))
        assert tiers.wait("aa") == ["disk"]
        assert np.array_equal(tiers.shared.slots[10:14], tiers.bytes[:4])


def test_what_it_may_still_write_to_is_not_given_up_before_it_is_dead(tiers, monkeypatch):
    worker = tiers.client._worker
    os.kill(tiers.pid, signal.SIGSTOP)  # it hangs
    tiers.fill("aa", range(4))
    monkeypatch.setattr(client_module, "STUCK_S", 0.0)
    monkeypatch.setattr(type(worker), "is_dead", False)
    for _ in range(20):
        tiers.client.poll()
    assert "aa" not in tiers.answers
    monkeypatch.undo()
    assert tiers.wait("aa") == [None]
    assert is_gone(worker.process.pid)


def test_closing_writes_what_is_queued(tmp_path):
    tiers = Tiers(tmp_path)
    names = [f"{number:02x}" for number in range(40)]
    for name in names:
        tiers.write(name, range(8))
    assert tiers.client.close()
    assert is_gone(tiers.pid)
    assert tiers.wait(*names) == [True] * 40
    with open_store(f"file://{tmp_path}?size=64MiB") as store:
        assert len(list(store.keys())) == 40


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_for_the_engine_do_not_end_it(tiers, how):
    if how != signal.SIGHUP:  # it has a session of its own, which no terminal hangs up
        os.kill(tiers.pid, how)
    tiers.write("aa", range(4))
    assert tiers.wait("aa") == [True]


def test_a_killed_engine_leaves_nothing(tmp_path):
    code = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from tests.tierworker.test_process import Tiers
        tiers = Tiers({str(tmp_path)!r})
        for number in range(200):
            tiers.write(f"{{number:02x}}", range(16))
        print(tiers.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    pid = int(run.stdout)
    until(lambda: is_gone(pid))
    with open_store(f"file://{tmp_path}?size=64MiB") as store:
        keys = list(store.keys())
        assert all(store.get(key) is not None for key in keys)
        assert not [path for path in Path(tmp_path).rglob("*") if "writing" in path.name and path.is_file()]


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("file:///proc/none?size=1MiB", StoreError, "cannot use /proc/none"),
        ("nothing://x", ConfigError, "nothing"),
    ],
)
def test_tiers_that_cannot_be_opened_stop_the_start(url, error, message):
    with pytest.raises(error, match=message):
        TierClient(Opening([url], "naive", None, NAMESPACES))


def test_shared_memory_cannot_be_cut_short():
    slots = SharedSlots(2, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(slots.fd, 0)
    with pytest.raises(ConfigError, match="must hold"):
        SharedSlots(200_000, 4096, fd=slots.fd)
    slots.close()
