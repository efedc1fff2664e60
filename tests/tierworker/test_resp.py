"""The Redis protocol of a cache server: kvlab's own ``redis://`` store over it, redis-py, and clients that lie."""

import random
import socket

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.errors import ConfigError, StoreError
from kvlab.stores import open_store
from kvlab.stores.base import MAX_KEY_BYTES
from kvlab.testing import StoreTests
from kvlab.tierworker import resp, resp_commands, resp_wire
from kvlab.tierworker.budget import Budget
from kvlab.tierworker.resp import RespServer

PATIENT = "timeout_ms=60000"


class TestRedisStoreOverIt(StoreTests):
    """Each place is a server."""

    persistent = True
    examples = 10

    @pytest.fixture(autouse=True)
    def places(self):
        self.servers = {}
        yield
        for server in self.servers.values():
            server.__exit__(None, None, None)

    def open(self, where, max_bytes):
        if where not in self.servers:
            store = open_store("memory://?size=64MiB&pinned=false")
            self.servers[where] = RespServer(store, "127.0.0.1:0").__enter__()
        return open_store(f"redis://127.0.0.1:{self.servers[where].port}?{PATIENT}")

    def test_a_key_that_is_too_long_is_refused(self, store):
        """Keys that are not of kvlab's form are marked on their way, and the server counts the mark."""
        longest = "kvlab:".ljust(MAX_KEY_BYTES, "k")
        assert store.put(longest, b"v") is True
        for key in (longest + "k", "\u9375" * MAX_KEY_BYTES, "k" * 1_000_000, "k" * MAX_KEY_BYTES):
            assert store.put(key, b"v") is False
            assert store.get(key) is None
            assert store.contains_many([key, longest]) == [False, True]
            assert store.delete(key) is False
        assert list(store.keys()) == [longest]


@pytest.fixture
def server():
    with RespServer(open_store("memory://?size=64MiB&pinned=false"), "127.0.0.1:0") as server:
        yield server


def test_a_client_of_redis_reads_and_writes(server):
    with redis.Redis(port=server.port, protocol=2) as client:
        assert client.ping()
        assert client.set("kvlab:a", b"x" * 200_000)
        assert client.get("kvlab:a") == b"x" * 200_000
        assert client.getrange("kvlab:a", 0, 3) == b"xxxx"
        assert client.strlen("kvlab:a") == 200_000
        assert client.exists("kvlab:a", "kvlab:b") == 1
        assert client.get("kvlab:b") is None
        for number in range(2500):
            client.set(f"kvlab:{number}", b"y")
        assert len(list(client.scan_iter("kvlab:*"))) == 2501
        assert client.dbsize() == 2501
        assert client.delete("kvlab:a", "kvlab:b") == 1
        assert client.info("memory")["maxmemory"] == 64 << 20
        with pytest.raises(redis.ResponseError):
            client.execute_command("FLUSHALL")


def test_a_password_is_asked_for():
    once = Retry(NoBackoff(), 0)  # else the client tries a wrong password again for seconds
    with RespServer(open_store("memory://?size=1MiB&pinned=false"), "127.0.0.1:0", password="marker") as server:
        for given in (None, "wrong"):
            with (
                redis.Redis(port=server.port, protocol=2, password=given, retry=once) as client,
                pytest.raises(redis.AuthenticationError),
            ):
                client.get("kvlab:a")
        with redis.Redis(port=server.port, protocol=2, password="marker") as client:
            assert client.set("kvlab:a", b"x")
        with open_store(f"redis://:marker@127.0.0.1:{server.port}?{PATIENT}") as store:
            assert store.get("kvlab:a") is None or bytes(store.get("kvlab:a")) == b"x"
        with pytest.raises(StoreError), open_store(f"redis://127.0.0.1:{server.port}?{PATIENT}") as store:
            store.get("kvlab:a")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_other_hosts_without_a_password_are_refused(address):
    with pytest.raises(ConfigError, match="can be reached from other hosts and has no password"):
        RespServer(open_store("memory://?size=1MiB&pinned=false"), address)


@pytest.mark.parametrize(
    "address", ["6379", "host:", ":6379", "127.0.0.1:99999", "127.0.0.1:http", "127.0.0.1:\u00b2", "a..b:80"]
)
def test_a_wrong_address_is_one_line(address):
    with pytest.raises(ConfigError):
        RespServer(open_store("memory://?size=1MiB&pinned=false"), address)


HOSTILE = [
    b"*99999999999\r\n", b"*1\r\n$99999999999\r\n", b"*-1\r\n", b"*0\r\n", b"GET a\r\n", b"*2\r\n$3\r\nGET\r\n$-5\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1152921504606846976\r\n", b"*1\r\n$4\r\nPINGxx", b"*" + b"1" * 1000, b"\x00" * 100,
    b"*131072\r\n" + b"$1000000\r\n",
]  # fmt: skip


def test_clients_that_lie_cost_no_other_anything(server):
    with redis.Redis(port=server.port, protocol=2) as client:
        client.set("kvlab:a", b"x")
        rng = random.Random(0)
        silent = socket.create_connection(("127.0.0.1", server.port))
        silent.sendall(b"*3\r\n$3\r\nSET\r\n$7\r\nkvlab:a\r\n$100000\r\nhalf")
        for number in range(1000):
            sock = socket.create_connection(("127.0.0.1", server.port))
            junk = HOSTILE[number % len(HOSTILE)] if number % 3 else rng.randbytes(rng.randrange(200))
            sock.sendall(junk)
            sock.close()
        assert client.get("kvlab:a") == b"x"
        silent.close()
    with RespServer(open_store("memory://?size=1MiB&pinned=false"), "127.0.0.1:0", password="marker") as closed:
        sock = socket.create_connection(("127.0.0.1", closed.port))
        sock.settimeout(20)
        sock.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$900000\r\n" + bytes(1000))
        assert sock.recv(100) == b"", "nothing large is taken from a stranger"
        sock.close()


def test_scans_that_are_dropped_say_so(server):
    with redis.Redis(port=server.port, protocol=2) as client:
        for number in range(2500):
            client.set(f"kvlab:{number}", b"y")
        first = client.scan(0)[0]
        for _ in range(resp.MAX_SCANS_OF_ONE):
            cursor, keys = client.scan(0)
            assert len(keys) == resp_commands.SCANNED
            assert cursor != 0
        with pytest.raises(redis.ResponseError, match="dropped"):
            client.scan(first)


def test_values_on_their_way_have_a_budget(server, monkeypatch):
    monkeypatch.setattr(resp_wire, "SILENCE_S", 0.2)
    server.budget = Budget(server.store, 3 << 20)
    with redis.Redis(port=server.port, protocol=2) as client:
        client.set("kvlab:a", bytes(2 << 20))
    half = b"*3\r\n$3\r\nSET\r\n$7\r\nkvlab:b\r\n$2097152\r\nhalf"
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(half)
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            other.settimeout(20)
            other.sendall(half)
            assert other.recv(10) == b"", "there is no room for a second one"
    with redis.Redis(port=server.port, protocol=2) as client:
        assert client.get("kvlab:a") == bytes(2 << 20)


def test_strangers_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(resp_wire, "STRANGER_S", 0.05)
    with (
        RespServer(open_store("memory://?size=1MiB&pinned=false"), "127.0.0.1:0", password="marker") as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.settimeout(20)
        assert sock.recv(1) == b""


def test_an_accept_that_fails_is_not_the_last(monkeypatch):
    """As without a free file descriptor."""
    monkeypatch.setattr(resp, "ACCEPT_AGAIN_S", 0.01)
    server = RespServer(open_store("memory://?size=1MiB&pinned=false"), "127.0.0.1:0")
    real, failed = server._socket, []

    class Failing:
        def accept(self):
            if len(failed) < 5:
                failed.append(True)
                raise OSError(24, "Too many open files")
            return real.accept()

        def close(self):
            real.close()

    server._socket = Failing()
    with server:
        for _ in range(3):
            with redis.Redis(port=server.port, protocol=2) as client:
                assert client.ping()
    assert len(failed) == 5
