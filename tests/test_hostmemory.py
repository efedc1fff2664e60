"""Reserved memory: where it starts, what it holds, and that the system gives it when told."""

import mmap
import threading
from pathlib import Path

import numpy as np
import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import HUGE_PAGE, PAGE, address, aligned, populate, reserve, scratch


@pytest.mark.parametrize("size", [0, 1, 4096, HUGE_PAGE - 1, (5 << 20) + 3])
def test_it_is_zeroed_writable_aligned_and_of_the_size_asked_for(size):
    memory = reserve(size)
    assert memory.shape == (size,)
    assert memory.ctypes.data % HUGE_PAGE == 0
    assert not memory.any()
    memory[:] = 7
    assert (memory == 7).all()


def test_it_takes_no_memory_before_it_is_used_or_populated():
    size = 256 << 20
    before = resident()
    memory = reserve(size)
    assert resident() - before < size // 10
    populate(memory)
    assert resident() - before > size * 9 // 10


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_populating_changes_no_byte(threads):
    memory = reserve((70 << 20) + 5)
    memory[::4096] = np.arange(memory[::4096].size) % 251
    want = memory.copy()
    populate(memory, threads=threads)
    populate(memory[3:-1], threads=threads)  # neither end at a page
    populate(memory[:10], threads=threads)
    assert np.array_equal(memory, want)


def test_more_than_the_system_has_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"cannot reserve .* of host memory: .*smaller size"):
        reserve(1 << 60)


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


def test_it_is_left_out_of_core_dumps():
    memory = reserve(8 << 20)
    address, flags = memory.ctypes.data, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and ":" not in first:
            start, end = (int(side, 16) for side in first.split("-"))
            inside = start <= address < end
        elif first == "VmFlags:" and inside:
            flags = rest
    assert "dd" in flags.split()


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 << 20])
def test_an_aligned_buffer_is_whole_pages_at_a_page(size):
    memory = aligned(size)
    assert address(memory) % PAGE == 0
    assert memory.nbytes % PAGE == 0
    assert size <= memory.nbytes <= max(size, 1) + PAGE - 1
    memory[:] = b"\xff" * memory.nbytes


def test_more_than_there_is_memory_is_a_reason():
    for size in (1 << 60, (1 << 63) - 1):
        with pytest.raises(StoreError, match=f"no memory for {size} bytes") as caught:
            aligned(size)
        assert caught.value.reason == "memory"


def test_scratch_is_a_threads_own_and_an_owners_own():
    mine = scratch("a", 100)
    assert address(scratch("a", PAGE)) == address(mine)
    assert scratch("a", PAGE + 1).nbytes == 2 * PAGE
    assert scratch("a", 100).nbytes == PAGE, "no longer than asked for: what does not fit is seen"
    assert address(scratch("b", 100)) != address(scratch("a", 100))
    others = []
    thread = threading.Thread(target=lambda: others.append(scratch("a", 100)))
    thread.start()
    thread.join()
    assert address(others[0]) != address(scratch("a", 100))
