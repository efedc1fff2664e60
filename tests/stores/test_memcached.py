"""memcached as a tier: the suite of all stores against the real server, its own faults, logins, TLS, names, URLs."""

import itertools
import os
import socket

import pytest
import trustme
from faults import PATIENT, FaultTests, reason_of
from planted import MARK

from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError, StoreError
from kvlab.machine.memcached_server import MemcachedServer
from kvlab.stores import check_url, open_store
from kvlab.stores.memcached.store import PASSWORD
from kvlab.stores.spec import TierSpec
from kvlab.testing import StoreTests

count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with MemcachedServer() as server:
        yield server


@pytest.fixture
def url(server):
    return f"{server.url}/test-{next(count)}?{PATIENT}"


class TestMemcachedStore(StoreTests):
    persistent = True
    examples = 15

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    def open(self, where, max_bytes):
        return open_store(f"{self.server.url}/{where.parent.name[:60]}/{where.name}?{PATIENT}")


class TestFaults(FaultTests):
    @pytest.fixture
    def server(self, server):
        return server

    def url(self, port, place, options):
        return f"memcached://127.0.0.1:{port}/{place}?{options}"


def say(server, line):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(line)
        return sock.recv(1000)


def test_stores_see_what_is_below_their_prefix_alone(url):
    with open_store(url) as store, open_store(url.replace("?", "/below?")) as below:
        for key in ("k", "k" * 1000):
            store.put(key, b"above")
            below.put(key, b"below")
        assert sorted(store.keys()) == sorted(below.keys()) == ["k", "k" * 1000]
        assert bytes(store.get("k")) == b"above"
        store.clear()
        assert bytes(below.get("k" * 1000)) == b"below"


def test_what_other_programs_have_is_no_value(server, url):
    prefix = url.partition("?")[0].rpartition("/")[2]
    assert say(server, b"set other 0 0 1\r\nx\r\n") == b"STORED\r\n"
    for name in (b"k", b"%zz", b"=" + b"0" * 64, b"=00"):
        assert say(server, b"set kvlab/%s/%s 5 0 1\r\nx\r\n" % (prefix.encode(), name)) == b"STORED\r\n"
    with open_store(url) as store:
        assert (store.get("k"), store.size_of("k"), store.get_head("k", 3)) == (None, None, None)
        assert store.contains_many(["k", "other"]) == [False, False]
        assert store.put("k", b"ours")
        assert bytes(store.get("k")) == b"ours"
        assert list(store.keys()) == ["k"]
        assert not store.errors


def test_the_server_has_the_budget():
    with MemcachedServer(memory_mib=64) as server, open_store(f"{server.url}?{PATIENT}&limit=100MiB") as store:
        assert store.max_bytes == 64 << 20
        stored = [store.put(f"k{index}", bytes(6 << 20)) for index in range(40)]
        assert sum(stored) >= 30
        assert store.used_bytes <= store.max_bytes
        assert sum(store.contains_many([f"k{index}" for index in range(40)])) < 12
        assert store.why_missing("k0") == "evicted"
        assert store.put("long", bytes(40 << 20)) is False
        assert store.stats()["error_too_large"] == 1
        assert store.put("longer", bytes((100 << 20) + 1)) is False
        assert store.stats()["error_too_large"] == 2


def test_a_server_without_room_refuses():
    with MemcachedServer("-M", memory_mib=64) as server, open_store(f"{server.url}?{PATIENT}") as store:
        stored = [store.put(f"k{index}", bytes(6 << 20)) for index in range(20)]
        assert stored[0]
        assert not stored[-1]
        assert store.stats()["error_full"] == stored.count(False) == store.counters.refused
        assert store.contains("k0")


def test_a_value_over_this_readers_limit_is_not_read(url):
    with open_store(url) as store, open_store(url + "&limit=1000") as small:
        assert store.put("k", bytes(1001))
        assert small.put("l", bytes(1001)) is False
        assert reason_of(lambda: small.get("k")) == "failed"
        assert small.contains("k")


def test_values_end(url):
    with open_store(url + "&ttl_ms=1000") as store:
        store.put("k", b"v")
        assert store.contains("k")
        while store.contains("k"):
            pass
        assert store.get("k") is None


def test_a_value_that_comes_between_look_and_removal_stays(url, monkeypatch):
    with open_store(url) as store, open_store(url) as other:
        store.put("k", b"broken")
        head = store._versioned_head

        def later(*args):
            found = head(*args)
            other.put("k", b"good")
            return found

        monkeypatch.setattr(store, "_versioned_head", later)
        assert store.quarantine("k", "checksum", b"broken") is False
        assert bytes(other.get("k")) == b"good"


def test_wrong_credentials_are_told(tmp_path, monkeypatch):
    (tmp_path / "users").write_text(f"kv:{MARK}\n")
    (tmp_path / "password").write_text(MARK)
    with MemcachedServer("-Y", str(tmp_path / "users")) as server:
        at = f"127.0.0.1:{server.port}?{PATIENT}"
        for login in ("", "kv:wrong@", f"other:{MARK}@"):
            with open_store(f"memcached://{login}{at}") as store:
                for call in (lambda store=store: store.get("k"), lambda store=store: store.put("k", b"v")):
                    assert reason_of(call) == "auth"
                assert store.stats()["error_auth"] == 2
        for url in (f"memcached://kv:{MARK}@{at}", f"memcached://kv@{at}&password_file={tmp_path}/password"):
            with open_store(url) as store:
                assert store.put("k", bytes(2 << 20))
                assert store.size_of("k") == 2 << 20
        monkeypatch.setenv(PASSWORD, MARK)
        with open_store(f"memcached://kv@{at}") as store:
            assert store.contains("k")


def test_tls_is_verified(tmp_path):
    ca = trustme.CA()
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    settings = ["-Z", "-o", f"ssl_chain_cert={tmp_path}/cert.pem,ssl_key={tmp_path}/key.pem"]
    with MemcachedServer(*settings) as server:
        at = f"memcached://localhost:{server.port}?{PATIENT}"
        with open_store(f"{at}&tls=true&ca={tmp_path}/ca.pem") as store:
            value = os.urandom(3 << 20)
            assert store.put("k", [value[:5], value[5:]])
            assert bytes(store.get("k")) == value
        with open_store(f"{at}&tls=true") as store:
            assert reason_of(lambda: store.get("k")) == "tls"
        url = f"{at}&tls=true&ca={tmp_path}/ca.pem".replace("localhost", "127.0.0.1")
        with open_store(url) as store:
            assert reason_of(lambda: store.get("k")) == "tls", "the certificate is for another name"
        with open_store(at.replace("60000", "2000")) as store:
            assert reason_of(lambda: store.get("k")) in ("disconnected", "protocol", "timeout")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("memcached://h:1?size=10GiB", "the budget is the server's"),
        ("memcached://user@h:1", "a login needs user and password"),
        ("memcached://:pw@h:1", "a login needs user and password"),
        ("memcached://", "host or host:port"),
        ("memcached://h:1,g:2", "host or host:port"),
        ("memcached://h/" + "p" * 200, "the prefix of"),
        ("memcached://h?ca=/none", "unknown option"),
        ("memcached://h?tls=true&ca=/none", "cannot use the ca"),
    ],
)
def test_a_wrong_url_says_what_to_do(wrong, words, monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    with pytest.raises(ConfigError, match=words):
        open_store(wrong)


def test_a_url_is_known_wherever_tiers_are():
    url = "memcached://cache:11211/team?timeout_ms=500"
    check_url(url)
    assert vllm_config(["memory://?size=1GiB", url])["kv_connector_extra_config"]["tiers"][1] == url
    spec = TierSpec.parse(url + "&gb_per_s=1&latency_ms=2")
    assert (spec.name, spec.size_bytes) == ("memcached://cache:11211/team", None)
    assert repr(open_store(url)) == f"open_store('{url}')"


@pytest.mark.parametrize(
    "url",
    [
        f"memcached://user:{MARK}@127.0.0.1:1",
        f"memcached://:{MARK}@127.0.0.1:1",
        f"memcached://127.0.0.1:1?password={MARK}",
        f"memcached://u@127.0.0.1:1?password={MARK}&zz=1",
        f"memcached://u@127.0.0.1:1?password_file={MARK}",
        f"memcached://u:{MARK}@127.0.0.1:1?tls=true&ca=/none",
    ],
)
def test_no_error_shows_a_password(url, attempt):
    def use():
        with open_store(url) as store:
            print(repr(store), vars(store), store.stats(), store._as_call())
            store.get("k")

    assert isinstance(attempt(use), ConfigError | StoreError)
    attempt(lambda: vllm_config([url]))
