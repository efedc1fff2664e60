"""Host names: a name server that is silent costs a call its deadline, and names of a cluster's nodes work."""

import contextlib
import os
import socket
import threading
import time

import pytest
from liars import Liar, bulk
from lying import URLS, recovers
from servers import PATIENT, Server, running, wait_for

from kvlab.errors import StoreError
from kvlab.stores import lookup, open_store
from kvlab.stores.redis.url import PASSWORD


@pytest.fixture(autouse=True)
def no_password(monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)


@pytest.fixture
def silent(monkeypatch):
    """A resolver that answers for no name until the event is set, at the end of the test at the latest."""
    resolve, answers, asked, given_up = socket.getaddrinfo, threading.Event(), [], []

    def getaddrinfo(host, port, *args, flags=0, **options):
        if not flags & socket.AI_NUMERICHOST:
            asked.append(host)
            if not answers.wait(20):
                given_up.append(host)
                raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")
        return resolve(host, port, *args, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(lookup._lookups, "room", threading.BoundedSemaphore(4))
    answers.asked, answers.given_up = asked, given_up
    yield answers
    answers.set()


def named(kind):
    """A server that names ever new hosts."""
    names = iter(range(10_000))

    def host():
        return bulk(b"h%d.kvlab.invalid" % next(names))

    if kind == "sentinel":
        return {b"SENTINEL": lambda liar, sock, args: b"*2\r\n" + host() + bulk(b"6379")}
    if kind == "cluster":
        return {b"CLUSTER": lambda liar, sock, args: b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n" + host() + b":6379\r\n"}
    return {b"GET": lambda liar, sock, args: b"-MOVED 5 h%d.kvlab.invalid:6379\r\n" % next(names)}


@pytest.mark.parametrize("kind", ["sentinel", "cluster", "moved"])
def test_a_call_does_not_wait_for_a_silent_name_server(silent, kind):
    url = URLS["cluster" if kind == "moved" else kind]
    with Liar(named(kind)) as liar, open_store(url.format(liar.port)) as store:
        tries = 0
        while tries < 6 or not silent.asked:  # on a busy machine a call may end before it asks
            tries += 1
            with contextlib.suppress(StoreError):
                assert store.get("kvlab:a") is None
        assert silent.given_up == [], "a call waited for the resolver"
        assert 0 < len(silent.asked) <= 4, "there are as many threads as there may be"
        assert sum(store.errors.values()) > 0
        silent.set()
        liar.lies = {}
        recovers(store)


def test_a_name_in_the_url_has_the_deadline_too(silent):
    with Liar() as liar, open_store(f"redis://localhost:{liar.port}?timeout_ms=200&retry_ms=1") as store:
        with pytest.raises(StoreError, match="no name server gives an address in time") as caught:
            store.get("kvlab:a")
        assert caught.value.reason == "timeout"
        silent.set()
        recovers(store)


def test_a_name_that_does_not_exist_is_unreachable(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with open_store(f"redis://h.kvlab.invalid:6379?{PATIENT}") as store:
        with pytest.raises(StoreError) as caught:
            store.get("kvlab:a")
        assert caught.value.reason == "unreachable"


def test_look_ups_that_hang_in_the_parent_take_no_room_of_a_child(silent):
    for _ in range(4):
        with pytest.raises(TimeoutError):
            lookup.addresses_of("h.kvlab.invalid", 1, time.monotonic() + 0.05)
    with pytest.raises(TimeoutError, match="other host names"):
        lookup.addresses_of("localhost", 1, time.monotonic() + 0.05)
    child = os.fork()
    if child == 0:
        socket.getaddrinfo = lambda *args, **options: [(2, 1, 6, "", "here")] if options["flags"] == 0 else fail()
        found = lookup.addresses_of("localhost", 1, time.monotonic() + 60)
        os._exit(0 if found == [(2, "here")] else 1)
    assert os.waitpid(child, 0)[1] == 0


def fail(*args, **options):
    raise socket.gaierror(socket.EAI_NONAME, "a name")


def test_a_cluster_that_names_its_nodes_by_host_names(tmp_path):
    names = ("cluster-announce-hostname localhost", "cluster-preferred-endpoint-type hostname")
    with running(Server(tmp_path / "node", "cluster-enabled yes", *names)) as (node,):
        with node.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_for(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"), "the cluster to form")
        with open_store(f"redis-cluster://127.0.0.1:{node.port}?{PATIENT}") as store:
            assert store.put("kvlab:a", b"v")
            assert bytes(store.get("kvlab:a")) == b"v"
            assert store.delete("kvlab:a") is True
            assert ("localhost", node.port) in store._topology._by_address
            assert store.errors == {}
