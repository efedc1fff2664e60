"""Writers killed at random moments: afterwards every object is sound or gone, and the book is right."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from folders import bytes_in

from kvlab.container import unpack
from kvlab.stores.disk import DiskStore

KILLS = 200
BUDGET = 2_000_000
WRITER = """
import os, random, sys, time
from kvlab.container import Part, pack
from kvlab.stores.disk import DiskStore

# Each line on standard input is a seed: fork a child that writes, removes and reads until it is killed.
def write_for_ever(root, seed):
    draw = random.Random(seed)
    with DiskStore(root, int(sys.argv[2])) as store:
        while True:
            key = f"k{draw.randrange(30)}"
            data = draw.randbytes(draw.randrange(1, 200_000))
            store.put(key, pack(key, {"kv": Part("U8", (len(data),), memoryview(data))}))
            if draw.random() < 0.2:
                store.delete(f"k{draw.randrange(30)}")
            if draw.random() < 0.1:
                store.quarantine(f"k{draw.randrange(30)}", "test")

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        write_for_ever(sys.argv[1], int(line))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


# Each line on standard input is a number n: fork a child that does a bit of everything and dies at its n-th call to
# the system, right after it. Answers whether it came so far.
CALLS = """
import os, sys
from kvlab.container import Part, pack
from kvlab.stores.disk import DiskStore

def work(root, last):
    calls = 0

    def counted(function):
        def called(*args, **kwargs):
            nonlocal calls
            done = function(*args, **kwargs)
            calls += 1
            if calls == last:
                os._exit(9)
            return done
        return called

    for name in ("open", "write", "pwritev", "ftruncate", "rename", "unlink", "close", "utime"):
        setattr(os, name, counted(getattr(os, name)))
    with DiskStore(root, int(sys.argv[2])) as store:
        for step in range(9):
            key = f"k{step % 4}"
            data = bytes([step]) * (300_000 + 1_000 * step)
            store.put(key, pack(key, {"kv": Part("U8", (len(data),), memoryview(data))}))
        store.get("k0")
        store.quarantine("k0", "test")
        store.delete("k1")
    os._exit(0)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(sys.argv[1], int(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def nurseries(tmp_path):
    """Two processes that each bring up one writer at a time on the same folder."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "kv"), str(BUDGET)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started = [subprocess.Popen(command, **pipes) for _ in range(2)]
    yield started
    for process in started:
        process.stdin.close()
        process.wait(10)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path, nurseries):
    root = tmp_path / "kv"
    draw = random.Random(7)
    most = read_beside = 0
    with DiskStore(root, BUDGET) as witness:  # lives through all of it, as a server would
        for round_ in range(KILLS // 2):
            children = []
            for index, nursery in enumerate(nurseries):
                print(2 * round_ + index, file=nursery.stdin)
                children.append(int(nursery.stdout.readline()))
            until = time.monotonic() + draw.uniform(0.002, 0.06)
            reads = 0
            while time.monotonic() < until or reads < 3:  # a reader beside the writers: sound or nothing
                reads += 1
                key = f"k{draw.randrange(30)}"
                value = witness.get(key)
                if value is not None:
                    unpack(value, key)
                    read_beside += 1
            for child, nursery in zip(children, nurseries, strict=True):
                os.kill(child, signal.SIGKILL)
                assert nursery.stdout.readline() == "gone\n"
            assert bytes_in(root) <= BUDGET
            most = max(most, bytes_in(root))
            if round_ % 10 == 9:
                assert witness.put("witness", b"here")
                assert witness.used_bytes >= bytes_in(root), "the book may count too much for a while, never too little"
                check(root)
        assert read_beside > 0
        assert most > BUDGET // 2, "the budget was never near"
        assert bytes(witness.get("witness")) == b"here"
    with DiskStore(root, BUDGET) as store:
        assert store.used_bytes == bytes_in(root)
        assert list((root / ".kvlab" / "writing").iterdir()) == []


def test_a_death_at_any_call_never_leaves_more_than_the_book_counts(tmp_path):
    root = tmp_path / "kv"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    nursery = subprocess.Popen([sys.executable, "-c", CALLS, str(root), str(BUDGET)], **pipes)
    try:
        with DiskStore(root, BUDGET) as witness:
            for call in range(1, 1000):
                print(call, file=nursery.stdin)
                ended = int(nursery.stdout.readline())
                assert ended in (0, 9)
                assert bytes_in(root) <= BUDGET
                assert witness.used_bytes >= bytes_in(root), f"after call {call}"
                assert witness.put("witness", b"here")
                if ended == 0:
                    break
            assert call > 80, "it did nothing"
            check(root)
    finally:
        nursery.stdin.close()
        nursery.wait(10)


def check(root):
    with DiskStore(root, BUDGET) as store:
        keys = [key for key in list(store.keys()) if key != "witness"]
        assert keys
        for key in keys:
            unpack(store.get(key), key)  # raises if one byte is wrong
        assert store.used_bytes == bytes_in(root)
