"""A server of LMCache's protocol that lies: a value, a miss or StoreError, within the deadline and in little memory."""

import contextlib
import struct
import tracemalloc

import pytest
from liars import Listening
from lying import CALLS, outcome, recovers
from planted import MARK

from kvlab.errors import ConfigError, StoreError
from kvlab.stores import open_store
from kvlab.stores.lm.wire import EXIST, GET, PUT, name_of


def head(code, size=0, kind=4, last=0):
    return struct.pack("<9i", code, size, kind, 6, size, 0, 0, last, 0)


class LMLiar(Listening):
    """`lies` are answers by command, as bytes or as `lie(liar, sock, name)` that gives them, or None to hang up."""

    def __init__(self, lies=None):
        self.lies = dict(lies or {})
        self.data = {name_of("", f"kvlab:{key}"): f"value of {key}".encode() for key in "ab"}
        super().__init__()

    def serve(self, sock):
        with contextlib.suppress(OSError, struct.error), sock, sock.makefile("rb") as stream:
            while True:
                command, size, *_, name = struct.unpack("<9i150s", stream.read(186))
                name, value = name.rstrip(), stream.read(size) if command == PUT else b""
                lie = self.lies.get(command)
                said = lie(self, sock, name) if callable(lie) else lie
                if lie is None:
                    said = self.honest(command, name, value)
                if said is None:
                    return
                sock.sendall(said)

    def honest(self, command, name, value):
        if command == PUT:
            self.data[name] = value
            return b""
        found = self.data.get(name)
        if found is None:
            return head(400, kind=1)
        return head(200, len(found)) + found if command == GET else head(200, kind=1)


def endless(liar, sock, name):
    while not liar.closed.is_set():
        sock.sendall(b"x" * 10_000)


LIES = {
    "garbage": b"\x00\xff\x17hello\r\n" * 5,
    "another protocol": b"-ERR unknown command\r\n" * 2,
    "another code": head(500),
    "length of -1": head(200, -1),
    "length of 2 GiB": head(200, (1 << 31) - 1),
    "length of 1 MiB and nothing": head(200, 1 << 20),
    "two replies": (head(200, 10) + b"value of a") * 2,
    "longer than said": head(200, 10) + b"value of a" * 5,
    "a removed one with a value": head(200, 10, last=7) + b"value of a",
    "half a head and hang up": lambda liar, sock, name: sock.sendall(head(200)[:20]),
    "cut": lambda liar, sock, name: sock.sendall(head(200, 1000) + b"value"),
    "hang up": lambda liar, sock, name: None,
    "silence": b"",
    "without end": endless,
    "no such key": head(400, kind=1),
}


@pytest.mark.parametrize("how", LIES)
def test_a_lie_is_a_value_a_miss_or_an_error(how):
    """Memory is what tells whether a lie was believed: no buffer is taken for what cannot be."""
    options = "timeout_ms=300&retry_ms=1&longest_retry_ms=1&limit=1MiB"
    with (
        LMLiar(dict.fromkeys((GET, EXIST), LIES[how])) as liar,
        open_store(f"lm://127.0.0.1:{liar.port}?{options}") as store,
    ):
        tracemalloc.start()
        try:
            reasons = {outcome(call, store) for call in CALLS.values()}
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()
        assert reasons <= {"", "value too long", "protocol", "disconnected", "timeout", "truncated", "left_alone"}
        liar.lies = {}
        liar.data = {name_of("", f"kvlab:{key}"): f"value of {key}".encode() for key in "ab"}

        recovers(store)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (LIES["garbage"], "protocol"),
        (LIES["longer than said"], "protocol"),
        (LIES["half a head and hang up"], "disconnected"),
        (LIES["hang up"], "disconnected"),
        (LIES["silence"], "timeout"),
    ],
)
def test_each_failure_has_its_reason(lie, reason):
    patience = "timeout_ms=60000" if reason != "timeout" else "timeout_ms=200"
    with (
        LMLiar({GET: lie}) as liar,
        open_store(f"lm://127.0.0.1:{liar.port}?{patience}&retry_ms=60000&longest_retry_ms=60000") as store,
    ):
        assert outcome(CALLS["get"], store) == reason
        assert store.stats()[f"error_{reason}"] == 1
        assert store.why_missing("a") == "tier_down"
        assert outcome(CALLS["get"], store) == "left_alone"


def test_a_put_that_the_server_does_not_have_is_no_put():
    with LMLiar({PUT: b""}) as liar, open_store(f"lm://127.0.0.1:{liar.port}?timeout_ms=60000") as store:
        with pytest.raises(StoreError) as caught:
            store.put("p", b"v")
        assert caught.value.reason == "protocol"


def test_an_answer_byte_by_byte_ends_at_the_deadline():
    def drip(liar, sock, name):
        sock.sendall(head(200, 10_000))
        while not liar.closed.wait(0.02):
            sock.sendall(b"x")

    with LMLiar({GET: drip}) as liar, open_store(f"lm://127.0.0.1:{liar.port}?timeout_ms=300") as store:
        assert outcome(CALLS["get"], store) == "timeout"


@pytest.mark.parametrize(
    "url", [f"lm://user:{MARK}@h", f"lm://{MARK}@h:1", f"lm://h?password={MARK}", f"lm://h?token={MARK}"]
)
def test_a_url_holds_no_secret(url, attempt):
    assert isinstance(attempt(lambda: open_store(url)), ConfigError)
