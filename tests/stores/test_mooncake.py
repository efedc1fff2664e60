"""Mooncake Store as a tier: the suite of all stores against a real master and node, its own faults, URLs."""

import itertools
import os
import subprocess
import sys
import time

import pytest
from faults import HASTY, PATIENT, paused, quietly, reason_of
from planted import MARK
from servers import wait_for

from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError
from kvlab.machine.mooncake_server import MooncakeServer
from kvlab.stores import check_url, open_store
from kvlab.stores.spec import TierSpec
from kvlab.testing import StoreTests

count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with MooncakeServer() as server:
        yield server


def at(server, place, options=PATIENT):
    return f"mooncake://127.0.0.1:{server.port}/{place}?metrics_port={server.numbers_port}&{options}"


@pytest.fixture
def url(server):
    return at(server, f"test-{next(count)}")


class TestMooncakeStore(StoreTests):
    persistent = True
    examples = 8

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    def open(self, where, max_bytes):
        return open_store(at(self.server, f"{where.parent.name}/{where.name}"))


def test_stores_see_what_is_below_their_prefix_alone(url):
    with open_store(url) as store, open_store(url.replace("?", "/below?")) as below:
        store.put("k", b"above")
        below.put("k", b"below")
        assert (list(store.keys()), list(below.keys())) == (["k"], ["k"])
        assert bytes(store.get("k")) == b"above"
        store.clear()
        assert bytes(below.get("k")) == b"below"


def test_the_budget_is_the_nodes(server, url):
    with open_store(url) as store:
        assert store.max_bytes == 512 << 20
        stored = [store.put(f"k{index}", bytes(20 << 20)) for index in range(60)]
        assert sum(stored) > 40
        assert store.used_bytes <= store.max_bytes
        there = store.contains_many([f"k{index}" for index in range(60)])
        assert 5 <= sum(there) < 26
        assert store.why_missing(f"k{there.index(False)}") == "evicted"
        assert store.put("long", bytes(600 << 20)) is False
        assert store.stats()["error_too_large"] == 1
        store.clear()


def test_a_value_over_this_readers_limit_is_not_read(url):
    with open_store(url) as store, open_store(url + "&limit=1000") as small:
        assert store.put("k", bytes(1001))
        assert small.put("l", bytes(1001)) is False
        assert reason_of(lambda: small.get("k")) == "failed"
        assert small.contains("k")


def test_a_silent_master_costs_a_deadline(server):
    with open_store(at(server, "silent", HASTY.replace("300", "500"))) as store:
        wait_for(lambda: quietly(store.put, "k", b"v"), "a quick answer")
        with paused(server.pid):
            for call in (lambda: store.get("k"), lambda: store.put("k", b"w"), lambda: store.contains_many(["k", "l"])):
                start = time.monotonic()
                assert reason_of(call) == "timeout"
                assert time.monotonic() - start < 30
            assert store.stats()["error_timeout"] >= 3
        wait_for(lambda: quietly(store.put, "k", b"x"), "the store to take values")
        wait_for(lambda: bytes(quietly(store.get, "k") or b"") == b"x", "the store to come back")


def test_a_dead_node_loses_its_values_and_a_dead_master_all():
    with MooncakeServer(memory="64MB") as server, open_store(at(server, "dead")) as store:
        value = os.urandom(14 << 20)
        assert store.put("k", value)
        assert bytes(store.get("k")) == value
        server.kill_node()
        assert reason_of(lambda: store.get("k")) == "transfer"
        assert store.stats()["error_transfer"] == 1
        server.kill()
        assert reason_of(lambda: store.get("k")) in ("disconnected", "timeout")
        assert store.why_missing("k") == "tier_down"
        with open_store(at(server, "dead")) as other:
            start = time.monotonic()
            assert reason_of(lambda: other.get("k")) == "refused", "the library would wait 90 s"
            assert time.monotonic() - start < 60
        server.start()
        server.start_node()
        wait_for(lambda: quietly(store.put, "k", value), "the store to take values")
        assert bytes(store.get("k")) == value
        assert store.why_missing("absent") == "never_stored"


def test_garbage_where_an_object_was_is_a_miss(url):
    import torch

    from kvlab.engine import CacheEngine

    tokens, axes = {"first_token": 0, "end_token": 16}, ("layers", "tokens", "dims")
    pages, out = torch.randn(2, 16, 8), torch.empty(2, 16, 8)
    with open_store(url) as store:
        engine = CacheEngine(store, namespace="m")
        key = engine.namespace.key(b"one")
        for garbage in (b"", b"garbage", os.urandom(5000)):
            assert engine.save_object(key, pages, axes, **tokens)
            store.put(key, garbage)
            assert engine.load_object(key, out, axes=axes, **tokens) is None
            assert not store.contains(key), "set aside"
        assert engine.save_object(key, pages, axes, **tokens)
        assert engine.load_object(key, out, axes=axes, **tokens) is not None


def test_what_other_programs_have_is_no_value(server, url):
    with open_store(url) as store:
        store.put("k", b"v")
        connection = store._agent.connect(time.monotonic() + 60)
        for key, value in (("other", b"short"), ("long", b"longer than a mark")):
            connection.room(len(value))[:] = value
            connection.put(store._name(key), len(value), 0.0, time.monotonic() + 60)
        connection.close()
        for key in ("other", "long"):
            assert reason_of(lambda key=key: store.get(key)) == "protocol"
            assert store.put(key, b"ours")
            assert bytes(store.get(key)) == b"ours"
            assert store.delete(key)
        assert list(store.keys()) == ["k"]


def test_a_missing_library_is_one_line():
    code = (
        "import sys; sys.modules['mooncake'] = None\n"
        "from kvlab.stores import open_store, check_url\n"
        "check_url('mooncake://h:1')\n"
        "try: open_store('mooncake://h:1')\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.count("\n") == 1
    assert "mooncake://" in out.stdout
    assert "pip install" in out.stdout


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("mooncake://h:1?size=10GiB", "memory of Mooncake's nodes"),
        (f"mooncake://user:{MARK}@h:1", "no user and no password"),
        (f"mooncake://h:1?password={MARK}", "no user and no password"),
        ("mooncake://", "host or host:port"),
        ("mooncake://h:1?protocol=a b", "protocol must be"),
        ("mooncake://h:1?metrics_port=x", "metrics_port must be"),
        ("mooncake://h:1?limt=3GiB", "unknown option"),
    ],
)
def test_a_wrong_url_says_what_to_do(wrong, words, attempt):
    for check in (open_store, check_url):
        error = attempt(lambda check=check: check(wrong))
        assert isinstance(error, ConfigError)
        assert words in str(error)


def test_a_url_is_known_wherever_tiers_are():
    url = "mooncake://master:50051/team?protocol=rdma&device=mlx5_0&metrics_port=9003"
    check_url(url)
    assert vllm_config(["memory://?size=1GiB", url])["kv_connector_extra_config"]["tiers"][1] == url
    assert TierSpec.parse(url + "&gb_per_s=10").name == "mooncake://master:50051/team"
