"""What is not the store's stays: other programs' lists and hashes, and values that another client puts meanwhile."""

import pytest
from liars import Liar, bulk
from servers import PATIENT, Server, running

from kvlab.cli.store import main
from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.redis.resp import RespConnection

USERS = {
    "all": "+@all",
    "no_scripts": "+@all -@scripting",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    users = [f"user {name} on >pw ~kvlab:* {rights}" for name, rights in USERS.items()]
    with running(Server(tmp_path_factory.mktemp("redis"), *users)) as (server,):
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture(params=["all", "no_scripts"])
def store(request, server, client):
    with open_store(f"redis://{request.param}:pw@127.0.0.1:{server.port}?{PATIENT}") as store:
        yield store


@pytest.fixture
def foreign(client):
    """A list and a hash under names that keys have."""
    client.rpush("kvlab:jobs", "a", "b")
    client.hset("kvlab::hash", "x", "1")
    yield
    assert client.lrange("kvlab:jobs", 0, -1) == [b"a", b"b"]
    assert client.hgetall("kvlab::hash") == {b"x": b"1"}


def test_lists_and_hashes_are_neither_listed_nor_removed(foreign, store):
    assert store.put("kvlab:a", b"v")
    assert list(store.keys()) == ["kvlab:a"]
    for key in ("kvlab:jobs", "hash"):
        assert not store.contains(key)
        assert store.delete(key) is False
        assert store.quarantine(key, "checksum") is False
        assert store.quarantine(key, "checksum", b"") is False
        assert store.quarantine(key, "checksum", b"broken-broken") is False
        assert store.why_missing(key) == "never_stored"
    assert store.counters.dropped == 0
    assert store.delete("kvlab:a") is True
    assert store.delete("kvlab:a") is False
    store.put("kvlab:a", b"v")
    store.clear()
    assert list(store.keys()) == []
    assert store.errors == {}


@pytest.mark.parametrize("command", [("evict", "--to", "0"), ("clear", "--yes")])
def test_the_command_line_leaves_lists_and_hashes(foreign, server, client, command, capsys):
    client.set("kvlab:a", "v")
    main([command[0], server.url, *command[1:]])
    assert not client.exists("kvlab:a")


def test_a_server_that_cannot_scan_by_type(monkeypatch):
    """Redis before 6: the names are asked for without it, then which of them are values."""

    def scan(liar, sock, args):
        names = [b"kvlab:a", b"kvlab:jobs", b"kvlab:empty"]
        found = b"*2\r\n" + bulk(b"0") + b"*3\r\n" + b"".join(map(bulk, names))
        return b"-ERR syntax error\r\n" if b"TYPE" in args else found

    def size(liar, sock, args):
        return b"-WRONGTYPE x\r\n" if args[1] == b"kvlab:jobs" else liar.honest(args)

    with Liar({b"SCAN": scan, b"STRLEN": size}) as liar, open_store(f"redis://127.0.0.1:{liar.port}") as store:
        assert sorted(store.keys()) == ["kvlab:a", "kvlab:empty"]
        assert store.errors == {}


@pytest.mark.parametrize("found", [b"broken-broken", b"broken-br", b"short"])
def test_what_another_client_puts_before_any_step_of_a_quarantine_stays(server, client, monkeypatch, found):
    """The other client writes before the first command, or the second, and so on until there is no more."""
    send, turns = RespConnection._send, []

    def slow(self, commands, deadline):
        turns.append(commands)
        if len(turns) == meanwhile:
            client.set("kvlab:a", "a good new value")
        send(self, commands, deadline)

    monkeypatch.setattr(RespConnection, "_send", slow)
    with open_store(f"{server.url}?{PATIENT}") as store:
        for meanwhile in range(1, 6):
            client.set("kvlab:a", b"short" if found == b"short" else b"broken-broken")
            turns.clear()
            gone = store.quarantine("kvlab:a", "checksum", found)
            assert gone is (meanwhile > 1)
            assert client.get("kvlab:a") == (b"a good new value" if meanwhile <= len(turns) else None)


def test_a_quarantine_compares_all_that_was_read(store, client):
    for held, found, gone in (
        (b"x" * 100, [b"x" * 40, b"x" * 60], True),
        (b"x" * 100, [b"x" * 40, b"x" * 59], True),
        (b"x" * 100, b"x" * 99 + b"y", False),
        (b"x" * 100, b"x" * 101, False),
        (b"x" * 100, b"x" * 8, True),
        (b"x" * 100, b"x" * 7, False),
        (b"x" * 7, b"x" * 7, True),
        (b"", b"", True),
        (b"x", b"", False),
    ):
        client.set("kvlab:a", held)
        assert store.quarantine("kvlab:a", "test", found) is gone, (held, found)
        assert bool(client.exists("kvlab:a")) is not gone
    assert store.quarantine("kvlab:absent", "test", b"") is False


@pytest.mark.parametrize("size", [9, 10, 11, 1 << 20])
def test_a_head_is_no_longer_than_was_asked_for(size, monkeypatch):
    """Whatever the server said of the whole value's length."""
    lies = dict.fromkeys((b"GET", b"GETRANGE"), bulk(bytes(size)))
    for said in (5, 1000):
        lies[b"STRLEN"] = b":%d\r\n" % said
        with Liar(lies) as liar, open_store(f"redis://127.0.0.1:{liar.port}?{PATIENT}") as store:
            if size <= 10:
                assert bytes(store.get_head("kvlab:a", 10)) == bytes(size)
                continue
            with pytest.raises(StoreError) as caught:
                store.get_head("kvlab:a", 10)
            assert caught.value.reason == "protocol"
