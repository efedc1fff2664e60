"""A folder whose file system refuses single calls, one at a time or many: the budget holds, the book never counts too
little, nothing but StoreError comes out, and when the file system recovers so does the store."""

import contextlib
import errno
import fcntl
import itertools
import os
import random
import time

import pytest
from folders import bytes_in

from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.disk import DiskStore
from kvlab.stores.disk import index as folder_index
from kvlab.stores.disk.names import WRITING, path_of

BUDGET = 100_000
CALLS = ("open", "write", "pwritev", "pread", "preadv", "ftruncate", "rename", "unlink", "stat", "fstat", "mkdir",
         "scandir", "utime")  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Faulty:
    """`os` whose calls fail while `on`: where `fails(calls so far)` says so. A write may be cut short instead."""

    def __init__(self, monkeypatch, fails, draw, partial=False):
        self.on, self.calls, self.failed = False, 0, 0
        self.fails, self.draw, self.partial = fails, draw, partial
        for name in CALLS:
            monkeypatch.setattr(os, name, self.around(name, getattr(os, name)))

    def around(self, name, real):
        def called(*args, **options):
            if not self.on:
                return real(*args, **options)
            self.calls += 1
            if not self.fails(self.calls):
                return real(*args, **options)
            self.failed += 1
            if name == "write" and self.partial and len(args[1]) > 2:
                return real(args[0], args[1][: self.draw.randrange(1, len(args[1]))])
            raise OSError(self.draw.choice(ERRORS), f"injected into {name}")

        return called


def check(faulty, root, *stores):
    faulty.on = False
    counted = min(store.used_bytes for store in stores)
    assert bytes_in(root) <= min(BUDGET, counted)
    faulty.on = True


def recovers(faulty, root, *stores):
    faulty.on = False
    with DiskStore(root, BUDGET, direct=False) as fresh:
        assert fresh.used_bytes == bytes_in(root)
    for index in range(15):  # more than there is room for
        store = stores[index % len(stores)]
        assert store.put(f"after{index}", bytes(9_000))
        assert bytes_in(root) <= BUDGET
    assert [store.used_bytes for store in stores] == [bytes_in(root)] * len(stores)
    assert not list((root / ".kvlab" / "writing").iterdir())
    assert all(bytes(store.get("after14")) == bytes(9_000) for store in stores)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_many_faults(tmp_path, monkeypatch, seed, partial):
    root, draw = tmp_path / "kv", random.Random(seed)
    faulty = Faulty(monkeypatch, lambda _: draw.random() < 0.04, draw, partial)
    with DiskStore(root, BUDGET, direct=False) as one, DiskStore(root, BUDGET, direct=False) as two:
        for _ in range(250):
            faulty.on = True
            store, key = draw.choice((one, two)), f"k{draw.randrange(25)}"
            with contextlib.suppress(StoreError):
                act = draw.random()
                if act < 0.7:
                    store.put(key, bytes(draw.randrange(1_000, 20_000)))
                elif act < 0.8:
                    store.delete(key)
                elif act < 0.9:
                    store.quarantine(key, "test")
                else:
                    store.get(key)
            check(faulty, root, one, two)
        assert faulty.failed > 50
        recovers(faulty, root, one, two)


def test_each_call_failing_alone(tmp_path, monkeypatch):
    draw = random.Random(3)
    for number in itertools.count(1):
        root = tmp_path / str(number)
        with monkeypatch.context() as patch:
            faulty = Faulty(patch, lambda calls, number=number: calls == number, draw, partial=bool(number % 2))
            with DiskStore(root, BUDGET, direct=False) as one, DiskStore(root, BUDGET, direct=False) as two:
                faulty.on = True
                for step in range(9):
                    with contextlib.suppress(StoreError):
                        one.put(f"k{step % 6}", bytes(18_000 + step))
                    check(faulty, root, one, two)
                for work in (lambda: one.get("k0"), lambda: one.quarantine("k1", "test"), lambda: one.delete("k2")):
                    with contextlib.suppress(StoreError):
                        work()
                    check(faulty, root, one, two)
                recovers(faulty, root, one, two)
        if not faulty.failed:
            break
    assert number > 150, "it did nothing"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_file_that_cannot_be_opened_for_writing_is_not_counted(tmp_path, monkeypatch, code):
    root, opened = tmp_path / "kv", os.open
    with DiskStore(root, BUDGET) as store:
        assert store.put("kept", bytes(30_000))

        def full(path, flags, *mode, **options):
            if flags & os.O_CREAT:
                raise OSError(code, "injected", path)
            return opened(path, flags, *mode, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            for _ in range(20):
                with pytest.raises(StoreError) as caught:
                    store.put("new", bytes(20_000))
                assert caught.value.reason == errno.errorcode[code].lower()
                assert store.used_bytes == bytes_in(root) == 30_000
            assert bytes(store.get("kept")) == bytes(30_000)
        assert store.put("new", bytes(70_000))
        assert store.used_bytes == bytes_in(root) == BUDGET
        assert not list((root / ".kvlab" / "writing").iterdir())


def test_a_full_disk_can_be_opened_and_read(tmp_path, monkeypatch, caplog):
    root, opened = tmp_path / "kv", os.open
    with DiskStore(root, BUDGET) as store:
        assert store.put("kept", bytes(30_000))

    def full(path, flags, *mode, **options):
        if flags & os.O_CREAT and not (root / str(path)).exists() and path != "journal":
            raise OSError(errno.ENOSPC, "injected", path)
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", full)
    with DiskStore(root, BUDGET) as store:
        assert bytes(store.get("kept")) == bytes(30_000)
        assert store.stats()["io"] == "buffered"
        assert store.delete("kept")
        assert store.used_bytes == 0
    assert "no room under" in caplog.text


def test_a_file_that_cannot_be_removed_goes_on_counting_and_others_leave(tmp_path, monkeypatch):
    root, real = tmp_path / "kv", os.unlink
    with DiskStore(root, BUDGET) as store:
        for index in range(4):
            assert store.put(f"k{index}", bytes(24_000))

        def stuck(name, **options):
            if name.startswith(("k0.", "k1.")):
                raise PermissionError(errno.EPERM, "immutable", name)
            real(name, **options)

        monkeypatch.setattr(os, "unlink", stuck)
        assert store.put("new", bytes(40_000))
        assert sorted(store.keys()) == ["k0", "k1", "new"]
        assert store.used_bytes == bytes_in(root) == 88_000
        assert store.put("large", bytes(90_000)) is False
        assert store.used_bytes == bytes_in(root) <= BUDGET
        monkeypatch.setattr(os, "unlink", real)
        assert store.put("large", bytes(90_000))
        assert store.used_bytes == bytes_in(root) == 90_000


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path, monkeypatch):
    root = tmp_path / "kv"
    with DiskStore(root, BUDGET) as store:
        for index in range(5):
            store.put(f"k{index}", bytes(18_000))
    for unreadable in (1, 3, 5):
        with monkeypatch.context() as patch:
            real, listed = os.scandir, itertools.count(1)

            def scandir(fd, real=real, listed=listed, unreadable=unreadable):
                if next(listed) == unreadable:
                    raise PermissionError(errno.EACCES, "injected")
                return real(fd)

            patch.setattr(os, "scandir", scandir)
            with pytest.raises(StoreError):
                DiskStore(root, BUDGET)
    with DiskStore(root, BUDGET) as store:
        assert store.used_bytes == 90_000


def test_a_lock_that_is_never_given_up_is_a_failure_with_its_reason(tmp_path, monkeypatch):
    """Its holder was stopped, say."""
    store = open_store(f"file://{tmp_path}/kv?size=1MiB")
    assert store.put("kvlab:m:1", b"x" * 10)
    monkeypatch.setattr(folder_index, "LOCK_WAIT_S", 0.05)
    with (tmp_path / "kv" / folder_index.JOURNAL).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="has held its lock for") as caught:
            store.put("kvlab:m:2", b"y" * 10)
        assert caught.value.reason == "locked"
        assert bytes(store.get("kvlab:m:1")) == b"x" * 10
    assert store.put("kvlab:m:2", b"y" * 10)
    store.close()


def test_only_the_first_call_waits_for_a_lock_that_is_never_given_up(tmp_path, monkeypatch):
    """The next ones are refused at once, what needs no lock goes on, and the first call after it is free succeeds."""
    slept = []
    monkeypatch.setattr(
        folder_index.time, "sleep", lambda seconds, sleep=time.sleep: (slept.append(seconds), sleep(seconds))
    )
    store = open_store(f"file://{tmp_path}/kv?size=1MiB")
    for key in ("kvlab:m:1", "kvlab:m:gone"):
        assert store.put(key, b"x" * 10)
    (tmp_path / "kv" / path_of("kvlab:m:gone")).unlink()
    monkeypatch.setattr(folder_index, "LOCK_WAIT_S", 0.3)
    needs_lock = {
        "put": lambda: store.put("kvlab:m:2", b"y"),
        "delete": lambda: store.delete("kvlab:m:1"),
        "quarantine": lambda: store.quarantine("kvlab:m:1", "test"),
    }
    with (tmp_path / "kv" / folder_index.JOURNAL).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreError):
            store.put("kvlab:m:2", b"y")
        assert sum(slept) >= 0.2
        slept.clear()
        for _ in range(20):
            for call in needs_lock.values():
                with pytest.raises(StoreError, match="is left alone") as caught:
                    call()
                assert caught.value.reason == "locked"
        assert bytes(store.get("kvlab:m:1")) == b"x" * 10
        assert store.get("kvlab:m:gone") is None
        assert store.contains_many(["kvlab:m:1", "kvlab:m:2"]) == [True, False]
        assert store.size_of("kvlab:m:1") == 10
        assert store.why_missing("kvlab:m:2") == "never_stored"
        assert store.stats()["used_bytes"] >= 10
        assert "kvlab:m:1" in list(store.keys())
        assert slept == []
    assert store.put("kvlab:m:2", b"y")
    assert store.get("kvlab:m:gone") is None
    assert store.used_bytes == 11
    assert store.why_missing("kvlab:m:gone") == "vanished"
    store.close()


def test_reads_wait_for_no_lock(tmp_path, monkeypatch):
    """Not even the first one that finds a file gone of which the book knows."""
    monkeypatch.setattr(folder_index.time, "sleep", lambda _seconds: pytest.fail("waited"))
    with open_store(f"file://{tmp_path}/kv?size=1MiB") as store:
        assert store.put("kvlab:m:1", b"x")
        (tmp_path / "kv" / path_of("kvlab:m:1")).unlink()
        with (tmp_path / "kv" / folder_index.JOURNAL).open("r+b") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert store.get("kvlab:m:1") is None
            held.truncate()  # the journal is begun anew, which takes the lock to read
            assert store.contains_many(["kvlab:m:1"]) == [False]
            assert store.get("kvlab:m:1") is None


def test_a_file_in_the_making_that_another_has_locked_is_not_waited_for(tmp_path):
    """In a shared folder others can lock any file."""
    with open_store(f"file://{tmp_path}/kv?size=1MiB") as store:
        others = []
        open_file = store._root.open_file

        def open_and_lose_the_race(path, flags):
            fd = open_file(path, flags)
            if path.startswith(WRITING) and flags & os.O_CREAT:
                others.append((tmp_path / "kv" / path).open("rb"))
                fcntl.flock(others[-1], fcntl.LOCK_EX)
            return fd

        store._root.open_file = open_and_lose_the_race
        with pytest.raises(StoreError) as caught:
            store.put("kvlab:m:1", b"x")
        assert caught.value.reason == "eagain"
        store._root.open_file = open_file
        for other in others:
            other.close()
        assert store.put("kvlab:m:1", b"x")
