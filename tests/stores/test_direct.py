"""Direct I/O against plain reads, at every edge."""

import itertools
import os
import threading

import pytest

from kvlab import hostmemory
from kvlab.hostmemory import PAGE, aligned
from kvlab.stores.disk import direct
from kvlab.stores.disk.direct import read_file, write_file
from kvlab.testing.machines import pattern

SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE + 17]


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def open_file(tmp_path, request, monkeypatch):
    monkeypatch.setattr(direct, "SCRATCH_BYTES", 2 * PAGE)  # so that small values meet its edges too
    monkeypatch.setattr(hostmemory, "_local", threading.local())
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if request.param else 0)
    fd = os.open(tmp_path / "file", flags, 0o600)
    yield fd, tmp_path / "file", request.param
    os.close(fd)


def in_memory(value, offset):
    room = aligned(len(value) + PAGE)
    room[offset : offset + len(value)] = value
    return room[offset : offset + len(value)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("cuts", [(), (1,), (PAGE,), (PAGE, 2 * PAGE), (100, PAGE + 100)])
def test_written_bytes_and_length(open_file, size, offset, cuts):
    fd, path, direct_io = open_file
    value = pattern(size)
    edges = [0, *[min(cut, size) for cut in cuts], size]
    pieces = [in_memory(value[a:b], offset) for a, b in itertools.pairwise(edges)]
    assert write_file(fd, pieces, direct=direct_io) == size
    assert path.read_bytes() == value


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("extra", [0, 10, PAGE])
def test_read_bytes(open_file, size, offset, extra):
    fd, path, direct_io = open_file
    path.write_bytes(pattern(size))
    out = in_memory(b"\xee" * (size + extra), offset)
    assert read_file(fd, [out], size, direct=direct_io) == size
    assert bytes(out[:size]) == pattern(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("lengths", [(PAGE, 8 * PAGE), (2 * PAGE, PAGE, 8 * PAGE), (10, PAGE), (PAGE,)])
def test_read_into_several_buffers(open_file, size, offset, lengths):
    fd, path, direct_io = open_file
    path.write_bytes(pattern(size))
    out = [in_memory(b"\xee" * length, offset) for length in lengths]
    size = min(size, sum(lengths))
    assert read_file(fd, out, size, direct=direct_io) == size
    assert b"".join(out)[:size] == pattern(size)


def test_a_shorter_file_gives_less(open_file):
    fd, path, direct_io = open_file
    path.write_bytes(pattern(PAGE + 5))
    assert read_file(fd, [aligned(4 * PAGE)], 3 * PAGE, direct=direct_io) == PAGE + 5
