"""How a server fails, for the tests of every store that has one: `FaultTests` is inherited with `server` and `url`."""

import contextlib
import os
import socket
import threading

import pytest
import torch
from liars import hang_up
from servers import paused, wait_for

from kvlab.engine import CacheEngine
from kvlab.errors import StoreError
from kvlab.stores import open_store

PATIENT = "timeout_ms=60000&retry_ms=1&longest_retry_ms=1"
HASTY = "timeout_ms=300&retry_ms=1&longest_retry_ms=1"


def reason_of(work):
    """Why `work` fails when the server is asked: after a failure it is left alone for a while."""
    while True:
        with pytest.raises(StoreError) as caught:
            work()
        if caught.value.reason != "left_alone":
            return caught.value.reason


def quietly(work, *args):
    with contextlib.suppress(StoreError):
        return work(*args)
    return None


class Cutter:
    """Stands before a server; after so many bytes of answers it calls `then`."""

    def __init__(self, port, num_bytes, then):
        self._to, self._left, self._then = port, num_bytes, then
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        hang_up(self._listener, self._sockets)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [client, server]
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source, sink, counted):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counted:
                    self._left -= len(data)
                    if self._left < 0 and self._then:
                        then, self._then = self._then, None
                        then()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


class FaultTests:
    """`server` is a real one that can be killed and started again, and knows its `pid` and `port`."""

    persistent = False  # it has its values after a start
    refused = "refused"  # why a server that is not there does not answer
    cut = "disconnected"  # why a value that ends early is no value

    @pytest.fixture
    def server(self):
        raise NotImplementedError

    def url(self, port, place, options):
        """Of a store at `place`, on the server or what stands before it."""
        raise NotImplementedError

    def test_a_server_killed_in_the_middle_of_a_value_and_back_again(self, server):
        value = os.urandom(15 << 20)
        cutter = Cutter(server.port, 1 << 20, server.kill)
        try:
            with (
                open_store(self.url(cutter.port, "killed", PATIENT)) as store,
                open_store(self.url(server.port, "killed", PATIENT)) as direct,
            ):
                assert store.put("big", value)
                direct.put("small", b"v")
                assert reason_of(lambda: store.get("big")) == self.cut
                assert store.stats()[f"error_{self.cut}"] == 1
                assert reason_of(lambda: direct.get("big")) in (self.refused, "disconnected")
                assert reason_of(lambda: direct.put("other", b"v")) == self.refused
                assert direct.why_missing("big") == "tier_down"
                server.start()
                wait_for(lambda: quietly(direct.put, "new", b"v"), "the server to be back")
                got = direct.get("big")
                assert (got is not None) is self.persistent
                assert got is None or bytes(got) == value
                assert bytes(direct.get("new")) == b"v"
                assert direct.why_missing("absent") == "never_stored"
        finally:
            cutter.close()
            server.kill()
            server.start()  # for the tests behind it

    def test_a_server_that_is_silent_costs_a_deadline(self, server):
        """Each call ends although nothing ever answers; then it is left alone."""
        with open_store(self.url(server.port, "silent", HASTY)) as store:
            wait_for(lambda: quietly(store.put, "k", b"v"), "a quick answer")
            before = store.errors["timeout"]  # of a busy machine
            calls = [
                lambda: store.get("k"),
                lambda: store.put("p", bytes(14 << 20)),
                lambda: store.contains_many([f"k{index}" for index in range(100)]),
                lambda: store.size_of("k"),
                lambda: store.get_head("k", 5),
                lambda: store.delete("k"),
                lambda: store.quarantine("k", "test", b"v"),
            ]
            with paused(server.pid):
                for call in calls:
                    assert reason_of(call) == "timeout"
                assert store.stats()["error_timeout"] == before + len(calls)
            # What timed out may have been done all the same, the removal too.
            wait_for(lambda: quietly(store.put, "k", b"w"), "the store to take values")
            wait_for(lambda: bytes(quietly(store.get, "k") or b"") == b"w", "the store to come back")

    def test_a_server_that_failed_is_left_alone_for_a_while(self, server):
        with open_store(
            self.url(server.port, "alone", "timeout_ms=200&retry_ms=60000&longest_retry_ms=60000")
        ) as store:
            with paused(server.pid):
                assert reason_of(lambda: store.get("k")) == "timeout"
            for call in (lambda: store.get("k"), lambda: store.put("k", b"v"), lambda: store.contains_many(["k"])):
                with pytest.raises(StoreError) as caught:
                    call()
                assert caught.value.reason == "left_alone"

    def test_no_server_and_no_host(self, server):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with open_store(self.url(port, "none", PATIENT)) as store:
            assert reason_of(lambda: store.get("k")) == self.refused
        url = self.url(port, "none", PATIENT).replace("127.0.0.1", "no-such-host.invalid")
        with open_store(url) as store:
            assert reason_of(lambda: store.get("k")) in ("unreachable", "timeout")

    def test_garbage_where_an_object_was_is_a_miss(self, server):
        tokens = {"first_token": 0, "end_token": 16}
        pages, out = torch.randn(2, 16, 8), torch.empty(2, 16, 8)
        with open_store(self.url(server.port, "garbage", PATIENT)) as store:
            engine = CacheEngine(store, namespace="m")
            key = engine.namespace.key(b"one")
            axes = ("layers", "tokens", "dims")
            for garbage in (b"", b"garbage", os.urandom(5000), bytes(100_000)):
                assert engine.save_object(key, pages, axes, **tokens)
                store.put(key, garbage)
                assert engine.load_object(key, out, axes=axes, **tokens) is None
                assert not store.contains(key), "set aside"
            assert store.counters.dropped == 4
            assert engine.save_object(key, pages, axes, **tokens)
            assert engine.load_object(key, out, axes=axes, **tokens) is not None
            assert torch.equal(out, pages)
