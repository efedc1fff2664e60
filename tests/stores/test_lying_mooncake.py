"""A page of a Mooncake master's numbers that lies, and an agent that does: values, misses or StoreError, in bounds."""

import contextlib
import socket
import time
import tracemalloc

import pytest
from liars import Listening

from kvlab.errors import StoreError
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.mooncake import agent, numbers
from kvlab.stores.mooncake.client import AgentConnection

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
TOTALS = b"master_allocated_bytes 5\nmaster_total_capacity_bytes 9\n"
REASONS = {"protocol", "truncated", "disconnected", "timeout", "no_numbers"}


class Page(Listening):
    def __init__(self, said):
        self.said = said
        super().__init__()

    def serve(self, sock):
        with contextlib.suppress(OSError), sock:
            sock.recv(1000)
            if callable(self.said):
                self.said(self, sock)
            else:
                sock.sendall(self.said)


def endless(liar, sock):
    while not liar.closed.is_set():
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000)


LIES = {
    "garbage": b"\x00\xff\x17hello\r\n",
    "nothing": b"",
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nkvlab/a",
    "a length of 2^62": b"HTTP/1.1 200 OK\r\nContent-Length: 4611686018427387904\r\n\r\n",
    "no end": endless,
    "silence": lambda liar, sock: liar.closed.wait(60),
}


@pytest.mark.parametrize("how", LIES)
def test_a_page_that_lies_is_an_error(how):
    with Page(LIES[how]) as liar:
        tracemalloc.start()
        try:
            for ask in (numbers.names, numbers.totals):
                with pytest.raises(StoreError) as caught:
                    ask("127.0.0.1", liar.port, time.monotonic() + 0.5)
                assert caught.value.reason in REASONS
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("text", [b"", b"master_allocated_bytes x\n", TOTALS.replace(b"5", b"9" * 30), b"\xff\n" * 99])
def test_totals_are_numbers(text):
    with Page(OK % (len(text), text)) as liar, pytest.raises(StoreError) as caught:
        numbers.totals("127.0.0.1", liar.port, time.monotonic() + 60)
    assert caught.value.reason == "protocol"


def test_a_sound_page_is_read():
    with Page(OK % (len(TOTALS), TOTALS)) as liar:
        assert numbers.totals("127.0.0.1", liar.port, time.monotonic() + 60) == {"used_bytes": 5, "max_bytes": 9}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(StoreError) as caught:
        numbers.names("127.0.0.1", port, time.monotonic() + 60)
    assert caught.value.reason == "refused"


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        ([(agent.TOO_SMALL, 1 << 40)], "too long"),
        ([(0, 1 << 40)], None),
        ([(-704, 0)], None),
        ([(-12345, 0)], "failed"),
        ([(-800, 0)], "transfer"),
        ([], "disconnected"),
    ],
)
def test_no_memory_is_taken_for_what_an_agent_cannot_have_read(replies, reason):
    ours, theirs = socket.socketpair()
    connection = AgentConnection(ours)
    for reply in replies:
        theirs.sendall(agent.REPLY.pack(*reply))
    theirs.shutdown(socket.SHUT_WR)
    if reason is None:
        assert connection.get("k", 1000, time.monotonic() + 60) is None
    else:
        with pytest.raises((StoreError, ConnectionError)) as caught:
            connection.get("k", 1000, time.monotonic() + 60)
        found = "too long" if isinstance(caught.value, ValueTooLongError) else getattr(caught.value, "reason", "")
        assert (found or "disconnected") == reason
    connection.close()
    theirs.close()
