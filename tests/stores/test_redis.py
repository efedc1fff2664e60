"""The Redis tier against a real server: the suite, its limits, and each way a server lets one down."""

import contextlib
import socket
import ssl
import threading
import time

import pytest
import trustme
from servers import PATIENT, Front, Server, running, wait_for

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import aligned
from kvlab.stores import open_store
from kvlab.stores.redis import resp
from kvlab.stores.redis import store as redis_store
from kvlab.stores.redis.node import NodeDownError
from kvlab.stores.redis.replies import name_of
from kvlab.testing import StoreTests
from kvlab.testing.machines import pattern


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(Server(tmp_path_factory.mktemp("redis"), "maxmemory 200mb", "maxmemory-policy allkeys-lru")) as (
        server,
    ):
        yield server


@pytest.fixture
def store(server):
    with server.client() as client:
        client.flushall()
    with open_store(f"redis://127.0.0.1:{server.port}?{PATIENT}") as store:
        yield store


class OnServer(StoreTests):
    """Each place is a database of the server, emptied when first seen."""

    persistent = True
    examples = 15

    @pytest.fixture(autouse=True)
    def places(self, server):
        self.server = server
        self.seen = {}

    def open(self, where, max_bytes):
        if where not in self.seen:
            self.seen[where] = len(self.seen) % 16
            with self.server.client(db=self.seen[where]) as client:
                client.flushdb()
        return open_store(self.url(self.seen[where]))


class TestRedisOverTCP(OnServer):
    def url(self, db):
        return f"redis://127.0.0.1:{self.server.port}/{db}?{PATIENT}"


class TestRedisOverUnixSocket(OnServer):
    def url(self, db):
        return f"unix://{self.server.socket_path}?db={db}&{PATIENT}"


class TestRedisOverTLS(OnServer):
    examples = 3

    @pytest.fixture(autouse=True)
    def tls(self, tmp_path, server):
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(tmp_path / "ca.pem")
        self.ca_path = tmp_path / "ca.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert("localhost").configure_cert(context)
        self.front = Front(server.port, context)
        yield
        self.front.close()

    def url(self, db):
        return f"rediss://localhost:{self.front.port}/{db}?ca={self.ca_path}&{PATIENT}"

    def test_a_certificate_nobody_vouches_for_is_refused(self, caplog):
        with open_store(f"rediss://localhost:{self.front.port}") as store:
            with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
                store.get("k")
            assert store.errors["tls"] == 1

    def test_a_certificate_for_another_host_is_refused(self):
        with open_store(f"rediss://127.0.0.1:{self.front.port}?ca={self.ca_path}") as store:
            with pytest.raises(StoreError):
                store.put("k", b"v")
            assert store.errors["tls"] == 1
        with open_store(f"rediss://127.0.0.1:{self.front.port}?verify=false") as store:
            assert store.put("k", b"v")


def test_one_readable_key_per_object(store, server):
    store.put("kvlab:org-Model:00ff:aa", b"v")
    store.put("other", b"w")
    with server.client() as client:
        assert sorted(client.keys()) == [b"kvlab::other", b"kvlab:org-Model:00ff:aa"]
        assert client.ttl("kvlab::other") == -1


def test_keys_of_others_are_neither_seen_nor_cleared(store, server):
    with server.client() as client:
        client.set("session:1", "somebody's")
        store.put("k", b"v")
        assert list(store.keys()) == ["k"]
        store.clear()
        assert client.get("session:1") == b"somebody's"


def test_a_lookup_of_many_keys_is_one_round_trip(server):
    front = Front(server.port)
    try:
        with open_store(f"redis://127.0.0.1:{front.port}") as store:
            store.put("k7", b"v")
            before = front.turns
            found = store.contains_many([f"k{index}" for index in range(500)])
            assert front.turns == before + 1
            assert [index for index, there in enumerate(found) if there] == [7]
    finally:
        front.close()


def test_a_lookup_of_more_keys_than_a_reply_may_have_items(store, monkeypatch):
    monkeypatch.setattr(resp, "MOST_ITEMS", 1000)
    monkeypatch.setattr(redis_store, "PIPELINED", 400)
    store.put("k2099", b"v")
    found = store.contains_many([f"k{index}" for index in range(2_100)])
    assert found.index(True) == 2_099
    assert sum(found) == 1
    store.touch(f"k{index}" for index in range(2_100))
    assert store.errors == {}


def test_large_values_go_into_the_callers_buffer(store):
    value = pattern(251 * 16) * 3600  # 14 MiB
    room = aligned(len(value))
    assert store.put("k", [value[:4096], memoryview(value)[4096:]])
    assert store.get_into("k", room) == len(value)
    assert bytes(room[: len(value)]) == value


@pytest.mark.parametrize("ttl_ms", ["0.4", "0.6"])
def test_a_ttl_of_less_than_a_millisecond_is_not_for_ever(server, ttl_ms):
    with open_store(f"redis://127.0.0.1:{server.port}?ttl_ms={ttl_ms}") as store:
        assert store._ttl_ms == 1


def test_ttl(server):
    with open_store(f"redis://127.0.0.1:{server.port}?ttl_ms=60") as store:
        store.put("short-lived", b"v")
        assert store.contains("short-lived")
        wait_for(lambda: not store.contains("short-lived"), "the value to expire")
        assert store.get("short-lived") is None


def test_values_over_the_servers_limit_are_refused_before_sending(tmp_path):
    with running(Server(tmp_path / "s", "proto-max-bulk-len 1mb")) as (server,), server.client() as client:
        with open_store(f"redis://127.0.0.1:{server.port}") as store:
            assert store.put("k", bytes(1 << 20))
            before = client.info("stats")["total_net_input_bytes"]
            assert store.put("k", bytes((1 << 20) + 1)) is False
            assert client.info("stats")["total_net_input_bytes"] - before < 10_000
            assert store.stats()["error_too_large"] == 1
            assert store.counters.refused == 1
        with open_store(f"redis://127.0.0.1:{server.port}?limit=1000") as store:
            assert store.put("k", bytes(1001)) is False


def test_at_maxmemory_the_server_lets_the_oldest_go_or_refuses(tmp_path):
    with (
        running(Server(tmp_path / "s", "maxmemory 8mb", "maxmemory-policy allkeys-lru")) as (server,),
        open_store(f"redis://127.0.0.1:{server.port}") as store,
        server.client() as client,
    ):
        assert store.max_bytes == 8 << 20
        for index in range(30):
            assert store.put(f"k{index}", bytes([index]) * (1 << 20))
        held = [index for index in range(30) if store.contains(f"k{index}")]
        assert 0 < len(held) < 8
        assert all(bytes(store.get(f"k{index}")) == bytes([index]) * (1 << 20) for index in held)
        assert store.get("k0") is None
        assert store.why_missing("k0") == "evicted"
        assert store.used_bytes <= 8 << 20
        client.config_set("maxmemory-policy", "noeviction")
        refused = sum(not store.put(f"more{index}", bytes(1 << 20)) for index in range(10))
        assert refused > 0
        assert store.stats()["error_maxmemory"] == refused


def test_a_server_without_a_budget_is_told(tmp_path, caplog):
    with running(Server(tmp_path / "s")) as (server,), open_store(f"redis://127.0.0.1:{server.port}") as store:
        assert store.max_bytes > 1 << 30
        assert "no maxmemory" in caplog.text


def test_passwords_and_users(tmp_path):
    settings = ("requirepass secret", "user kv on >pass@word ~kvlab:* +@all")
    with running(Server(tmp_path / "s", *settings)) as (server,):
        at = f"127.0.0.1:{server.port}"
        for url in (f"redis://:secret@{at}", f"redis://kv:pass%40word@{at}"):
            with open_store(url) as store:
                assert store.put("k", b"v")
                assert bytes(store.get("k")) == b"v"
        for url in (f"redis://:hunter2@{at}", f"redis://{at}"):
            with open_store(url) as store:
                with pytest.raises(StoreError) as caught:
                    store.get("k")
                assert caught.value.reason in ("auth", "noauth")
                assert store.errors[caught.value.reason] == 1
                assert "hunter2" not in str(caught.value)
        with pytest.raises(ConfigError) as caught:
            open_store(f"redis://:hunter2@{at}?polcy=x")
        assert "hunter2" not in str(caught.value)


def test_a_user_who_may_not_ask_for_settings_can_store(tmp_path):
    rights = "user kv on >pw ~kvlab:* -@all +get +set +exists +strlen +unlink +touch +scan"
    with (
        running(Server(tmp_path / "s", rights)) as (server,),
        open_store(f"redis://kv:pw@127.0.0.1:{server.port}") as store,
    ):
        assert store.put("k", b"v")
        assert bytes(store.get("k")) == b"v"
        assert store.contains_many(["k", "l"]) == [True, False]
        assert store.delete("k")
        assert store.used_bytes == 0
        assert store.errors == {"noperm": 1}


def test_urls_are_checked():
    for url in (
        "redis://",
        "redis://host:port",
        "redis://host/x",
        "redis-sentinel://host:1",
        "unix://",
        "redis-cluster://h/3",
    ):
        with pytest.raises(ConfigError):
            open_store(url)


def test_a_dead_server_costs_a_bounded_wait_then_nothing_then_comes_back(tmp_path):
    with (
        running(Server(tmp_path / "s")) as (server,),
        open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=60000&retry_ms=300&longest_retry_ms=500") as store,
    ):
        store.put("k", b"v")
        server.kill()
        with pytest.raises(StoreError) as caught:
            store.get("k")
        assert caught.value.reason in ("unreachable", "disconnected"), "not timeout: nothing was waited for"
        for _ in range(20):
            with pytest.raises(StoreError):
                store.contains_many(["k"])
        assert store.errors["left_alone"] > 0
        assert store.why_missing("k") == "tier_down"
        server.start()
        wait_for(lambda: works(store), "the store to come back")
        assert store.get("k") is None
        assert store.why_missing("k") == "evicted"


def works(store):
    try:
        return store.put("back", b"v")
    except StoreError:
        return False


def test_a_restarted_server_is_not_even_noticed(tmp_path):
    with running(Server(tmp_path / "s")) as (server,), open_store(f"redis://127.0.0.1:{server.port}") as store:
        assert store.put("k", b"v")
        server.kill()
        server.start()
        assert store.get("k") is None
        assert store.put("k", b"w")
        assert store.errors == {}


def test_a_paused_server_costs_the_deadline_not_more(tmp_path):
    with (
        running(Server(tmp_path / "s")) as (server,),
        open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=150&retry_ms=50&longest_retry_ms=100") as store,
    ):
        wait_for(lambda: works(store), "a first value")
        before = store.errors["timeout"]
        with server.paused():  # for as long as the call takes
            with pytest.raises(NodeDownError) as caught:
                store.get("back")
            assert caught.value.reason == "timeout"
        assert store.errors["timeout"] == before + 1
        wait_for(lambda: works(store), "the store to come back")
        assert store._timeout_s == 0.15


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_a_server_that_trickles_costs_the_deadline_not_more(where):
    """It answers with a byte at a time, or takes next to nothing of a large value: each call to the socket would end in
    time, all of them would not."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def serve():
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            while b"ET\r\n" not in (asked := client.recv(4096)):  # before GET or SET comes what the store asks
                client.sendall(b"+OK\r\n" * asked.count(b"*"))
            client.sendall(b"$1000000\r\n" if where == "reading" else b"")
            while True:
                client.sendall(b"x") if where == "reading" else client.recv(1)
                time.sleep(0.02)

    threading.Thread(target=serve, daemon=True).start()
    with open_store(f"redis://127.0.0.1:{listener.getsockname()[1]}?timeout_ms=300&limit=64MiB") as store:
        start = time.monotonic()
        with pytest.raises(NodeDownError) as caught:
            store.get("k") if where == "reading" else store.put("k", bytes(32 << 20))
        assert time.monotonic() - start > 0.25
        assert caught.value.reason == "timeout"
    listener.close()


def test_a_value_of_another_kind_is_a_miss_and_can_be_replaced(store, server):
    with server.client() as client:
        client.rpush(name_of("k"), "a", "list")
    assert store.get("k") is None
    assert store.size_of("k") is None
    store.put("empty", b"")
    assert store.contains_many(["k", "empty", "absent"]) == [False, True, False]
    assert store.put("k", b"v")
    assert store.contains_many(["k"]) == [True]
    assert bytes(store.get("k")) == b"v"


@pytest.mark.parametrize(
    "reply", [b"$1152921504606846976\r\n", b"$-7\r\n", b"hello\r\n", b"x" * 200_000, b"*1152921504606846976\r\n"]
)
def test_an_answer_that_is_no_redis_is_an_error_and_allocates_nothing(reply):
    """What listens on the port may be anything; this one answers every command alike."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client):
        with client:
            while data := client.recv(1 << 16):
                client.sendall(reply if b"GET" in data else b"+OK\r\n" * data.count(b"*"))

    threading.Thread(target=serve, daemon=True).start()
    with open_store(f"redis://127.0.0.1:{listener.getsockname()[1]}?timeout_ms=500") as store:
        with pytest.raises(StoreError) as caught:
            store.get("k")
        assert caught.value.reason == "protocol"
    listener.close()


def test_many_threads_share_the_store(store):
    wrong = []

    def work(seed):
        for index in range(30):
            store.put(f"k{seed}.{index}", pattern(20_000, seed + index))
            if bytes(store.get(f"k{seed}.{index}")) != pattern(20_000, seed + index):
                wrong.append((seed, index))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.counters.hits == 240


def test_a_value_longer_than_this_readers_limit_is_no_fault_of_the_server(tmp_path):
    with running(Server(tmp_path / "s")) as (server,):
        url = f"redis://127.0.0.1:{server.port}"
        writer, reader = open_store(url), open_store(f"{url}?limit=1MiB")
        assert writer.put("long", bytes(2 << 20))
        assert writer.put("short", b"kv")
        with pytest.raises(StoreError, match="announced a value of 2097152 bytes; the limit is 1048576"):
            reader.get("long")
        assert bytes(reader.get("short")) == b"kv"
        writer.close()
        reader.close()
