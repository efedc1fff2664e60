"""A folder whose file system may hang, and locks that exclude no one."""

import subprocess
import sys
import threading
import time

import pytest

from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.disk import locks
from kvlab.testing import StoreTests


class TestMountStore(StoreTests):
    persistent = True
    examples = 15

    def open(self, where, max_bytes):
        return open_store(f"file://{where}?size={max_bytes}&deadline_ms=60000&shared=true")


def test_a_mount_that_hangs_costs_a_deadline_and_is_left_alone(tmp_path):
    gate, given = threading.Event(), []
    with open_store(f"file://{tmp_path}/kv?size=1MiB&deadline_ms=200") as store:
        store.put("k", b"value")
        put, get = store.inner.put, store.inner.get
        store.inner.get = lambda key: gate.wait(60) and get(key)

        def late(key, value):
            gate.wait(60)
            given.append(bytes(value))
            return put(key, value)

        store.inner.put = late
        start = time.monotonic()
        out = bytearray(b"\xee" * 5)
        with pytest.raises(StoreError) as caught:
            store.get_into("k", memoryview(out))
        assert caught.value.reason == "timeout"
        for call in (lambda: store.get("k"), lambda: store.contains_many(["k"]), lambda: store.used_bytes):
            with pytest.raises(StoreError) as caught:
                call()
            assert caught.value.reason == "left_alone"
        assert time.monotonic() - start < 30
        assert store.why_missing("k") == "tier_down"
        buffer = bytearray(b"first")
        store._health.hurry()
        with pytest.raises(StoreError) as caught:
            store.put("l", buffer)
        assert caught.value.reason == "timeout"
        buffer[:] = b"later"
        assert store.counters.errors == 2
        gate.set()
        while not given:
            time.sleep(0.01)
        store._health.hurry()
        assert bytes(store.get("k")) == b"value"
        assert given == [b"first"], "a late put has what it was given"
        assert bytes(out) == b"\xee" * 5, "a late read writes nowhere"
        assert store.stats()["error_timeout"] == 2
        assert store.why_missing("absent") == "never_stored"


def test_opening_a_mount_that_hangs_ends(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr("kvlab.stores.disk.mount.LISTING", 1)
    monkeypatch.setattr("kvlab.stores.disk.store.Root", lambda *args, **options: gate.wait(60))
    try:
        with pytest.raises(StoreError) as caught:
            open_store(f"file://{tmp_path}/kv?size=1MiB&deadline_ms=100")
        assert caught.value.reason == "timeout"
    finally:
        gate.set()


def test_locks_that_exclude_no_one_are_refused(tmp_path, monkeypatch):
    assert locks.exclude(tmp_path, tmp_path)
    monkeypatch.setattr(locks, "_locks", lambda fd: True)
    assert not locks.exclude(tmp_path, tmp_path)
    with pytest.raises(StoreError, match="exclude no one") as caught:
        open_store(f"file://{tmp_path}/kv?size=1MiB&shared=true")
    assert caught.value.reason == "locks"
    open_store(f"file://{tmp_path}/own?size=1MiB").close()


def test_locks_of_other_processes_are_asked_for_by_hand(tmp_path):
    command = [sys.executable, "-m", "kvlab.stores.disk.locks", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 1, "none holds it"
    with subprocess.Popen([*command, "--hold", "600"], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "granted\n"
            found = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert (found.returncode, found.stdout) == (0, "held by another process: locks are shared\n")
        finally:
            holder.kill()
