"""A memcached that lies: a value, a miss or StoreError, within the deadline and in little memory."""

import contextlib
import tracemalloc

import pytest
from liars import Listening
from lying import CALLS, outcome, recovers
from planted import MARK

from kvlab.errors import StoreError
from kvlab.stores import open_store

OPTIONS = "timeout_ms=300&retry_ms=1&longest_retry_ms=1&limit=1MiB"
HONEST = {f"kvlab/kvlab:{key}": f"value of {key}".encode() for key in "ab"}


class MemcachedLiar(Listening):
    """`lies` are answers by command, as bytes or as `lie(liar, sock, words)` that gives them, or None to hang up."""

    def __init__(self, lies=None):
        self.lies = dict(lies or {})
        self.data = dict(HONEST)
        super().__init__()

    def serve(self, sock):
        with contextlib.suppress(OSError, ValueError, IndexError), sock, sock.makefile("rb") as stream:
            while line := stream.readline():
                words = line.decode().split()
                value = stream.read(int(words[2]) + 2)[:-2] if words[0] == "ms" else b""
                lie = self.lies.get(words[0])
                said = lie(self, sock, words) if callable(lie) else self.honest(words, value) if lie is None else lie
                if said is None:
                    return
                sock.sendall(said)

    def honest(self, words, value):
        command, name = words[0], words[1] if len(words) > 1 else ""
        if command == "stats":
            return b"STAT bytes 1\r\nSTAT limit_maxbytes 1000\r\nEND\r\n"
        if command == "lru_crawler":
            return b"".join(b"key=%s exp=-1\n" % name.replace("/", "%2F").encode() for name in self.data) + b"END\r\n"
        if command == "ms":
            self.data[name] = value
            return b"HD\r\n"
        found = self.data.get(name)
        if command == "md":
            return b"HD\r\n" if self.data.pop(name, None) is not None else b"NF\r\n"
        if found is None:
            return b"EN\r\n"
        told = b"s%d f0 c1\r\n" % len(found)
        return b"VA %d %s%s\r\n" % (len(found), told, found) if "v" in words[2:] else b"HD " + told


def endless(more):
    def lie(liar, sock, words):
        while not liar.closed.is_set():
            sock.sendall(more)

    return lie


LIES = {
    "garbage": b"\x00\xff\x17hello\r\n",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n",
    "empty line": b"\r\n",
    "no size": b"VA\r\n",
    "size of -1": b"VA -1 s-1 f0 c1\r\n",
    "size of 5,000 digits": b"VA " + b"9" * 5000 + b" f0 c1\r\n",
    "size of 1 GiB": b"VA 1073741824 f0 c1\r\n",
    "size of 2^62": b"VA 4611686018427387904 f0 c1\r\n",
    "size of no number": b"VA x f0 c1\r\n",
    "no version": b"VA 10 s10\r\nvalue of a\r\n",
    "flags of 2^60": b"VA 10 s10 f1152921504606846976 c1\r\nvalue of a\r\n",
    "longer than said": b"VA 10 s10 f0 c1\r\nvalue of a and more\r\n",
    "two values": b"VA 10 s10 f0 c1\r\nvalue of a\r\n" * 2,
    "cut": lambda liar, sock, words: sock.sendall(b"VA 1000 s1000 f0 c1\r\nvalue"),
    "hang up": lambda liar, sock, words: None,
    "silence": b"",
    "line without end": endless(b"x" * 10_000),
    "values without end": endless(b"VA 10 s10 f0 c1\r\nvalue of a\r\n" * 100),
    "numbers without end": endless(b"STAT bytes 1\r\n" * 100),
    "names without end": endless(b"key=other exp=-1\n" * 100),
    "our names without end": endless(b"".join(b"key=kvlab%%2F%d exp=-1\n" % index for index in range(1000))),
    "ERROR": b"ERROR\r\n",
    "CLIENT_ERROR": b"CLIENT_ERROR bad\r\n",
    "SERVER_ERROR": b"SERVER_ERROR bad\r\n",
    "unauthenticated": b"CLIENT_ERROR unauthenticated\r\n",
    "BUSY": b"BUSY currently processing crawler request\r\n",
    "a miss": b"EN\r\n",
    "done": b"HD\r\n",
}
REASONS = {
    *("", "value too long", "protocol", "disconnected", "timeout", "left_alone", "server_error", "bad_request"),
    *("unknown_command", "auth", "busy"),
}


@pytest.mark.parametrize("how", LIES)
def test_a_lie_is_a_value_a_miss_or_an_error(how, monkeypatch):
    """Memory is what tells whether a lie was believed: no buffer is taken for what cannot be."""
    monkeypatch.setattr("kvlab.stores.memcached.store.LISTING", 3)
    monkeypatch.setattr("kvlab.stores.memcached.store.MOST_LISTED_BYTES", 4 << 20)
    every = dict.fromkeys(("mg", "ms", "md", "stats", "lru_crawler"), LIES[how])
    with MemcachedLiar(every) as liar, open_store(f"memcached://127.0.0.1:{liar.port}?{OPTIONS}") as store:
        tracemalloc.start()
        try:
            reasons = {outcome(call, store) for call in CALLS.values()}
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()
        assert reasons <= REASONS
        liar.lies, liar.data = {}, dict(HONEST)
        recovers(store)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (LIES["garbage"], "protocol"),
        (LIES["longer than said"], "protocol"),
        (LIES["cut"], "disconnected"),
        (LIES["hang up"], "disconnected"),
        (LIES["silence"], "timeout"),
        (LIES["ERROR"], "unknown_command"),
        (LIES["unauthenticated"], "auth"),
        (LIES["SERVER_ERROR"], "server_error"),
    ],
)
def test_each_failure_has_its_reason(lie, reason):
    patience = "timeout_ms=60000" if reason != "timeout" else "timeout_ms=200"
    with (
        MemcachedLiar({"mg": lie}) as liar,
        open_store(f"memcached://127.0.0.1:{liar.port}?{patience}&retry_ms=60000&longest_retry_ms=60000") as store,
    ):
        assert outcome(CALLS["get"], store) == reason
        assert store.stats()[f"error_{reason}"] == 1
        if reason != "server_error":
            assert store.why_missing("kvlab:a") == "tier_down"
            assert outcome(CALLS["get"], store) == "left_alone"


@pytest.mark.parametrize("lie", [f"STORED {MARK}\r\n", f"CLIENT_ERROR {MARK}\r\n", f"{MARK}\r\n"])
def test_a_server_that_repeats_the_password_is_not_quoted(lie, attempt):
    with MemcachedLiar({"set": lie.encode(), "mg": lie.encode()}) as liar:

        def use(url=f"memcached://kv:{MARK}@127.0.0.1:{liar.port}?{OPTIONS}"):
            with open_store(url) as store:
                store.get("k")

        assert isinstance(attempt(use), StoreError)
