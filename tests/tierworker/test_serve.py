"""`kvlab serve`: engines share its tiers through memory; what one of them does costs no other anything."""

import json
import os
import random
import resource
import signal
import stat
import struct
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.stores import open_store, open_stores
from kvlab.tierworker import server as server_module
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.messages import Ask, Memory, Opening, Write, message_of
from kvlab.tierworker.metrics import MetricsServer
from tests.support.gate import Gate
from tests.support.served import Attached, connected, opened
from tests.tierworker.test_process import LAYERS, NAMESPACES, PAGE, SLOTS, Tiers, until

ROOT = Path(__file__).parents[2]


def test_what_one_engine_saves_another_loads(engines):
    one, other = engines
    one.write("aa", range(4))
    assert one.wait("aa") == [True]
    other.fill("aa", [9, 8, 7, 6])
    assert other.wait("aa") == ["memory"]
    assert np.array_equal(other.shared.slots[[9, 8, 7, 6]], one.bytes[:4])


def test_an_engine_that_comes_back_finds_it(server, engines):
    one, _ = engines
    one.write("aa", range(4))
    one.wait("aa")
    assert one.client.close()
    again = Attached(server.path)
    again.fill("aa", range(10, 14))
    assert again.wait("aa") == ["memory"]
    assert np.array_equal(again.shared.slots[10:14], one.bytes[:4])
    again.client.close()


def test_another_namespace_finds_nothing(server, engines):
    engines[0].write("aa", range(4))
    engines[0].wait("aa")
    stranger = Attached(server.path, model="n")
    stranger.fill("aa", range(4))
    assert stranger.wait("aa") == [""]
    stranger.client.close()


def test_the_socket_is_this_users_alone(server):
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"listens at .* already"):
        CacheServer(server.store, server.path)


def test_no_server_is_one_clear_line(tmp_path):
    with pytest.raises(StoreError, match=r"no cache server listens at .*; start one with: kvlab serve"):
        Attached(tmp_path / "none.sock")


def test_tiers_of_its_own_an_attached_engine_may_not_bring(server, tmp_path):
    with pytest.raises(ConfigError, match="no tiers of its own"):
        TierClient(Opening([f"file://{tmp_path}/x"], "naive", None, NAMESPACES), path=str(server.path))
    spec = f"cachegen:tables={tmp_path}/x"  # a file that the server would open for a client
    with pytest.raises(ConfigError, match="a cache server codes no chunks as 'cachegen:tables="):
        TierClient(Opening([], spec, None, NAMESPACES), path=str(server.path))
    assert not (tmp_path / "x").exists()


def frames(rng):
    """Messages that are nearly right, and bytes that are none."""
    hash_ = rng.choice(["ab" * 16, "ab", 7, None, "z" * 32])
    runs = [
        [rng.choice([-1, 0, 5, SLOTS, 1 << 60]), rng.choice([-1, 0, 1, 4, 1 << 60])] for _ in range(rng.randrange(3))
    ]
    message = {
        "op": rng.choice(["fill", "write", "ask", "memory", "opening", "close?", "over", 3, None]),
        "id": rng.choice([0, 1, -1, 1 << 60, "x"]), "rank": rng.choice([0, 1, -1]), "version": rng.choice(["", "v", 5]),
        "hash": hash_, "runs": rng.choice([runs, None, [[0, 1]]]), "first_token": 0, "end_token": rng.choice([0, 32]),
        "generation": 1, "after": rng.choice([0, 1 << 52]), "num_slots": 1 << 40, "layers": 1 << 40, "page_bytes": 1,
        "num_hashes": rng.choice([0, 1, 1 << 19]), "chunk_blocks": rng.choice([0, 1]),
    }  # fmt: skip
    text = (repr(message) if rng.random() < 0.5 else json.dumps(message)).encode()
    data = rng.randbytes(rng.choice([0, 16, 17]))
    lengths = rng.choice([(len(text), len(data)), (len(text), 1 << 31), (3, len(data)), (len(text) + 1, 0)])
    return struct.pack("<II", *lengths) + text + data


def test_a_hostile_client_costs_no_other_anything(server, engines):
    one, other = engines
    one.write("aa", range(4))
    assert one.wait("aa") == [True]
    rng = random.Random(0)
    sent = 0
    silent = connected(server)  # half a frame, and then nothing
    silent.send(struct.pack("<II", 100, 0) + b"{")
    while sent < 10_000:
        sock = opened(server).socket if rng.random() < 0.5 else connected(server)
        sock.setblocking(True)
        try:
            for _ in range(50):
                sock.sendall(frames(rng))
                sent += 1
        except OSError:  # it was sent away
            sent += 1
        sock.close()
    other.shared.slots[:] = 7
    other.fill("aa", range(4))
    assert other.wait("aa") == ["memory"]
    assert np.array_equal(other.shared.slots[:4], one.bytes[:4])
    assert (other.shared.slots[4:] == 7).all()
    silent.close()
    until(lambda: server.num_engines == 2)


def test_memory_that_its_owner_can_cut_short_is_refused(server):
    link = opened(server)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 64 << 20)
    link.receive()
    link.send(message_of(Memory(SLOTS, LAYERS, PAGE)), fd=fd)
    os.close(fd)
    until(lambda: server.num_engines == 0)
    link.close()


def test_metrics_and_engines_are_counted(server, engines):
    engines[0].write("aa", range(4))
    engines[0].wait("aa")
    with MetricsServer(server, "127.0.0.1:0") as metrics:
        url = f"http://127.0.0.1:{metrics.port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            lines = answer.read().decode().splitlines()
    assert "kvlab_engines 2" in lines
    assert 'kvlab_tier_puts_total{tier="memory"} 1' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(
        {line for line in lines if line[:6] == "# TYPE"}
    )


def test_sigterm_writes_what_is_queued(command, tmp_path):
    path, process = command()
    engine = Attached(path)
    names = [f"{number:02x}" for number in range(20)]
    for name in names:
        engine.write(name, range(8))
    assert engine.wait(*names) == [True] * 20
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not path.exists()
    engine.client.close()
    with open_stores([f"file://{tmp_path}/kv?size=64MiB"]) as store:
        assert len(list(store.keys())) == 20


def test_a_killed_server_is_a_miss_and_is_found_again(command):
    path, process = command()
    engine = Attached(path)
    engine.client._wait_s = 0.05
    engine.write("aa", range(4))
    assert engine.wait("aa") == [True]
    process.kill()
    engine.fill("aa", range(4))
    assert engine.wait("aa")[0] in (None, "memory")
    process.wait()
    command()
    until(lambda: engine.client._is_open, engine.client.poll)
    engine.write("bb", range(4))
    assert engine.wait("bb") == [True]
    engine.fill("bb", range(10, 14))
    assert engine.wait("bb")[0] in ("memory", "disk")
    assert np.array_equal(engine.shared.slots[10:14], engine.bytes[:4])
    engine.client.close()


def test_a_stopped_server_keeps_the_slots_until_it_is_known_to_be_over(command):
    path, process = command()
    engine = Attached(path)
    process.send_signal(signal.SIGSTOP)
    engine.fill("aa", range(4))
    engine.client._worker.kill()  # the link is lost, the server may still write
    for _ in range(30):
        engine.client.poll()
    assert "aa" not in engine.answers
    process.send_signal(signal.SIGCONT)
    assert engine.wait("aa") == [None]
    engine.client.close()


def test_a_socket_that_is_gone_says_nothing_of_its_server(command):
    """Nor does another server at the same place."""
    path, process = command()
    engine = Attached(path)
    engine.client._wait_s = 0.01
    process.send_signal(signal.SIGSTOP)
    engine.fill("aa", range(4))
    engine.client._worker.kill()
    path.unlink()
    path.with_name(f"{path.name}.lock").unlink()
    for _ in range(30):
        engine.client.poll()
    _, second = command()
    asked = engine.client._worker._asked_at
    until(lambda: engine.client._worker._asked_at > asked + 1, engine.client.poll)
    assert "aa" not in engine.answers
    process.kill()
    process.wait()
    assert engine.wait("aa") == [None]
    until(lambda: engine.client._is_open, engine.client.poll)
    second.send_signal(signal.SIGTERM)
    engine.client.close()


def test_two_servers_never_share_a_place(command, tmp_path):
    path, process = command()
    with pytest.raises(ConfigError, match="already"):
        CacheServer(open_store("memory://?size=1MiB&pinned=false"), path)
    path.unlink()
    path.with_name(f"{path.name}.lock").unlink()
    _, second = command()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert path.exists(), "it is the second one's by now"
    engine = Attached(path)
    engine.client.close()
    assert second.poll() is None


def test_an_engine_with_many_open_files_goes_on(command):
    """A descriptor above 1,023 is none for select(2)."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    path, process = command()
    taken = [os.dup(0) for _ in range(1100)]
    try:
        engine = Attached(path)
        engine.client._wait_s = 0.05
        process.kill()
        process.wait()
        engine.fill("aa", range(4))
        assert engine.wait("aa")[0] in (None, "")
        command()
        until(lambda: engine.client._is_open, engine.client.poll)
        engine.client.close()
    finally:
        for fd in taken:
            os.close(fd)


def test_an_answer_that_cannot_be_understood_costs_the_worker_not_the_engine(tmp_path):
    tiers = Tiers(tmp_path)
    tiers.client._take = lambda message, data: 1 / 0
    tiers.write("aa", range(4))
    assert tiers.wait("aa") == [None]
    assert tiers.client.counters["tier_worker_deaths"] == 1
    tiers.client.close()


def test_a_session_that_is_left_waits_for_no_copy(server):
    engine = Attached(server.path)
    request = Write(engine.client.next_id(), *engine._place("aa", range(4)), generation=1, after=10**12)
    engine.client.write(request, lambda message, _: None)
    until(lambda: any(session._num_asked for session, _ in list(server._sessions.values())), engine.client.poll)
    engine.client._worker.kill()
    until(lambda: not server._sessions)


def test_questions_wait_in_the_socket_where_many_are_under_way(server, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_QUESTION_BYTES", 1000)
    gate = server.store = Gate(server.store)
    link = opened(server)
    question, data = message_of(Ask(1, "", 16, 4096, False)), bytes(4096 * 17)
    for _ in range(40):
        link.send(question, data)
    (session, _), *_ = server._sessions.values()
    until(lambda: link.flush() or session._question_bytes > 0)
    held = session._question_bytes
    assert 0 < held <= 2 << 20, "as much as one look at the socket brings"
    gate.is_open.set()
    until(lambda: link.receive() is not None and link.flush() and session._num_asked == 40)
    link.close()
