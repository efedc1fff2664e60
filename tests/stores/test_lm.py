"""LMCache's cache server as a tier: the suite of all stores against the real server, its own faults, URLs."""

import itertools
import socket
import time

import pytest
from faults import PATIENT, FaultTests, reason_of

from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError
from kvlab.machine.lm_server import LMServer
from kvlab.stores import check_url, open_store
from kvlab.stores.lm import wire
from kvlab.stores.spec import TierSpec
from kvlab.testing import StoreTests

count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with LMServer() as server:
        yield server


@pytest.fixture
def url(server):
    return f"{server.url}/test-{next(count)}?{PATIENT}"


class TestLMStore(StoreTests):
    persistent = True
    examples = 15

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    def open(self, where, max_bytes):
        return open_store(f"{self.server.url}/{where.parent.name}/{where.name}?{PATIENT}")


class TestFaults(FaultTests):
    cut = "truncated"

    @pytest.fixture
    def server(self, server):
        return server

    def url(self, port, place, options):
        return f"lm://127.0.0.1:{port}/{place}?{options}"


def test_stores_see_what_is_below_their_prefix_alone(url):
    with open_store(url) as store, open_store(url.replace("?", "-other?")) as other:
        store.put("k", b"value")
        assert other.get("k") is None
        assert list(other.keys()) == []


def test_what_another_store_removed_is_not_there(url):
    with open_store(url) as store, open_store(url) as other:
        store.put("k", b"value")
        store.put("l", b"value")
        assert other.contains_many(["k", "l", "m"]) == [True, True, False]
        assert other.delete("k")
        assert store.contains_many(["k", "l"]) == [False, True]
        assert (store.get("k"), store.size_of("k"), store.get_head("k", 5)) == (None, None, None)
        assert list(store.keys()) == ["l"]
        assert store.put("k", b"again")
        assert other.contains_many(["k"]) == [True]
        assert bytes(other.get("k")) == b"again"


def test_a_value_whose_writer_was_cut_off_is_removed_by_its_reader(server, url):
    """The server keeps its length, says that it is there, and hangs up when it is asked for."""
    prefix = url.rpartition("/")[2].partition("?")[0]
    for cut in (b"", bytes(1000)):
        with open_store(url) as store:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(wire._request(wire.PUT, wire.name_of(prefix, "k"), 5000) + cut)
            while not store.contains("k"):
                time.sleep(0.01)
            for read in (lambda: store.get("k"), lambda: store.get_head("k", 8)):
                assert read() is None
            assert (store.contains("k"), store.errors["truncated"], store.counters.dropped) == (False, 1, 1)
            assert store.why_missing("k") == "set_aside:truncated"
            assert store.put("k", b"whole")
            assert bytes(store.get("k")) == b"whole"
            assert store.delete("k")


def test_small_values_do_not_wait_for_acknowledgements(url):
    """Head and value come apart, and each reply alone: with delayed acknowledgements 40 ms for each."""
    with open_store(url) as store:
        store.put("k", bytes(4096))
        times = []
        for _ in range(50):
            start = time.perf_counter()
            store.get("k")
            store.contains_many(["k", "l", "m"])
            times.append(time.perf_counter() - start)
        assert min(times) < 0.03


def test_a_value_over_the_limit_is_refused(url):
    with open_store(url) as store, open_store(url + "&limit=1000") as small:
        assert store.put("k", bytes(1001))
        assert small.put("l", bytes(1001)) is False
        assert small.stats()["error_too_large"] == 1
        assert reason_of(lambda: small.get("k")) == "failed"
        assert small.contains("k")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("lm://h:1?size=10GiB", "evicts nothing"),
        ("lm://user:pw@h:1", "no user and no password"),
        ("lm://h:1?password=x", "no user and no password"),
        ("lm://", "host or host:port"),
        ("lm://h:1,g:2", "host or host:port"),
        ("lm://h:99999", "host or host:port"),
        ("lm://h:1?limit=3GiB", "less than 2GiB"),
        ("lm://h:1?limt=3GiB", "unknown option"),
    ],
)
def test_a_wrong_url_says_what_to_do(wrong, words):
    for check in (open_store, check_url):
        with pytest.raises(ConfigError, match=words):
            check(wrong)


def test_a_url_is_known_wherever_tiers_are():
    url = "lm://cache:65432/team?timeout_ms=500"
    check_url(url)
    assert vllm_config(["memory://?size=1GiB", url])["kv_connector_extra_config"]["tiers"][1] == url
    spec = TierSpec.parse(url + "&gb_per_s=1&latency_ms=2")
    assert (spec.name, spec.size_bytes, spec.gb_per_s) == ("lm://cache:65432/team", None, 1.0)
    assert repr(open_store(url)) == f"open_store('{url}')"
