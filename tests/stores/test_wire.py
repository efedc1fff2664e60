"""A connection keeps its deadline."""

import socket
import time

import pytest

from kvlab.stores import wire


@pytest.mark.parametrize("left", [0.9999999, 1.99999951, 1e-9, 2.0, 86_400.5])
def test_any_time_left_is_one_that_the_kernel_takes(left, monkeypatch):
    """Microseconds of a time must be less than a million, and a time of zero would be for ever."""
    monkeypatch.setattr(wire, "time_left", lambda deadline: left)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = wire.Wire(ours)
        theirs.sendall(b"line\r\n")
        assert connection.line(time.monotonic()) == b"line"
        connection.send(b"x", time.monotonic())
