"""Faults in what a cache stores: they are done, counted, the same for the same seed, and cost kvlab misses alone."""

import contextlib
import io
import json
import threading

import pytest
import torch

from kvlab.__main__ import main
from kvlab.chaos import Faults, FolderAgent, RedisProxy
from kvlab.chaos.faults import KINDS
from kvlab.chaos.redis import _parts
from kvlab.engine import CacheEngine
from kvlab.errors import ConfigError, StoreError
from kvlab.machine.redis_server import RedisServer
from kvlab.stores import open_store

PATIENT = "timeout_ms=60000&retry_ms=1&longest_retry_ms=1"
VALUES = {f"k{at}": bytes([at]) * 5000 for at in range(4)}


@pytest.fixture(scope="module")
def server():
    with RedisServer() as running:
        yield running


def through(server, faults):
    return RedisProxy(("127.0.0.1", server.port), faults, delay_ms=1)


def store_at(port):
    return open_store(f"redis://127.0.0.1:{port}?{PATIENT}")


def test_the_same_seed_draws_the_same_faults():
    def drawn(seed):
        faults = Faults(rate=0.5, seed=seed)
        for value in VALUES.values():
            faults.keep(value)
        return [faults.spoil(kind, VALUES["k1"]) if (kind := faults.draw()) else b"" for _ in range(60)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(("kinds", "rate"), [(["nosuch"], 0.1), ([], 0.1), (KINDS, -1), (KINDS, 1.1)])
def test_faults_that_do_not_exist_are_refused(kinds, rate):
    with pytest.raises(ConfigError, match=r"kinds must be|0 <= rate <= 1"):
        Faults(kinds, rate=rate)


def test_without_faults_all_passes_as_it_is(server):
    faults = Faults(rate=0)
    with through(server, faults) as proxy, store_at(proxy.port) as store:
        store.clear()
        for key, value in VALUES.items():
            assert store.put(key, value)
        assert [bytes(value) for value in store.get_many(list(VALUES))] == list(VALUES.values())
        assert store.contains_many(["k0", "no", "k3"]) == [True, False, True]
        assert sorted(store.keys()) == sorted(VALUES)
        assert bytes(store.get_head("k1", 100)) == VALUES["k1"][:100]
        assert store.put("big", bytes(5 << 20))
        assert len(store.get("big")) == 5 << 20
    assert faults.total == 0
    assert faults.seen >= 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_read_is_spoiled(server, kind):
    with store_at(server.port) as direct:
        direct.clear()
        for key, value in VALUES.items():
            direct.put(key, value)
    faults = Faults([kind], rate=1)
    faults.keep(VALUES["k2"])
    with through(server, faults) as proxy, store_at(proxy.port) as store:
        if kind == "drop":
            with pytest.raises(StoreError):
                store.get("k1")
        else:
            got = bytes(store.get("k1"))
            wrong = {"delay": VALUES["k1"], "swap": VALUES["k2"], "replay": VALUES["k2"]}
            assert got == wrong[kind] if kind in wrong else got != VALUES["k1"]
            assert len(got) == 5000 or kind == "truncate"
    assert faults.counts[kind] >= 1
    assert faults.total == faults.counts[kind]


def test_replies_of_both_protocols_are_read():
    replies = [
        b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"$3\r\nabc\r\n", b"*2\r\n$1\r\na\r\n*1\r\n:3\r\n", b"*-1\r\n", b"_\r\n",
        b"%1\r\n+k\r\n$2\r\nvv\r\n", b"=7\r\ntxt:abc\r\n", b"|1\r\n+a\r\n+b\r\n:5\r\n", b"~1\r\n#t\r\n", b"-ERR x\r\n",
    ]  # fmt: skip
    stream = io.BytesIO(b"".join(replies))
    for reply in replies:
        parts = list(_parts(stream))
        assert b"".join(head + (value + b"\r\n" if value is not None else b"") for head, value in parts) == reply
    for broken in (b"", b"+OK", b"?\r\n", b"$x\r\n", b"$5\r\nab", b"$99999999999999\r\n"):
        assert list(_parts(io.BytesIO(broken))) == []


def kv_of(at):
    return torch.full((2, 32, 1, 2, 8), float(at), dtype=torch.float32)


def used_while(store, strike):
    """Loads of an engine over `store` while faults are done: how many had KV, of how many."""
    engine, hits = CacheEngine(store, namespace="chaos"), 0
    prompts = [[at * 100 + i for i in range(32)] for at in range(4)]
    for number in range(120):
        at = number % len(prompts)
        with contextlib.suppress(StoreError):
            engine.save(prompts[at], kv_of(at))
        strike()
        num_tokens, kv = engine.load(prompts[at])
        hits += bool(num_tokens)
        assert kv is None or torch.equal(kv, kv_of(at)[:, :num_tokens]), "a wrong answer"
    return hits


def test_no_answer_of_kvlab_is_wrong_behind_the_proxy(server):
    faults = Faults(rate=0.3, seed=3)
    with through(server, faults) as proxy, store_at(proxy.port) as store:
        hits = used_while(store, lambda: None)
    assert hits > 20
    assert faults.total > 20


def test_no_answer_of_kvlab_is_wrong_beside_the_agent(tmp_path):
    faults = Faults(rate=0.5, seed=4)
    agent = FolderAgent(tmp_path, faults, delay_ms=1)
    with open_store(f"file://{tmp_path}?size=1MiB") as store:
        hits = used_while(store, agent.strike)
    assert hits > 20
    assert faults.total > 20
    assert len(faults.counts) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_agent_does_what_it_counts(tmp_path, kind):
    (tmp_path / "deep").mkdir()
    for key, value in VALUES.items():
        (tmp_path / "deep" / key).write_bytes(value)
    (tmp_path / "index").write_bytes(b"small")
    faults = Faults([kind], rate=1)
    agent = FolderAgent(tmp_path, faults, delay_ms=1)
    agent.run(every_ms=0, limit=3)
    left = {path.name: path.read_bytes() for path in agent.files()}
    changed = [key for key, value in VALUES.items() if left.get(key) != value]
    assert faults.counts == {kind: 3}
    assert bool(changed) == (kind != "delay")
    assert (tmp_path / "index").read_bytes() == b"small"


def test_the_agent_ends_when_it_is_told(tmp_path):
    stop = threading.Event()
    stop.set()
    FolderAgent(tmp_path, Faults()).run(every_ms=0, stop=stop)
    with pytest.raises(ConfigError, match="chaos needs a folder"):
        FolderAgent(tmp_path / "absent", Faults())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["folder"], "give the folder"),
        (["folder", "/no/such"], "chaos needs a folder"),
        (["redis"], "give the Redis behind the proxy"),
        (["redis", "--to", "6379"], "--to must be HOST:PORT, got '6379'"),
        (["redis", "--to", "127.0.0.1:1", "--listen", "x:99999"], "--listen must be HOST:PORT"),
        (["folder", ".", "--kinds", "burn"], "kinds must be of delay, drop"),
        (["folder", ".", "--every-ms", "-1"], "must be 0 or more"),
    ],
)
def test_a_mistake_is_one_line(args, words, capsys):
    assert main(["chaos", *args]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_the_command_works_on_a_folder_and_counts(tmp_path, capsys):
    for key, value in VALUES.items():
        (tmp_path / key).write_bytes(value)
    args = ["chaos", "folder", str(tmp_path), "--kinds", "flip", "--rate", "1", "--every-ms", "0", "--limit", "4"]
    assert main(args) == 0
    assert capsys.readouterr().out == "4 faults in 4 values: 4 flip\n"
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"seen": 4, "faults": 4, "flip": 4}
