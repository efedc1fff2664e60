"""What a session may take of a cache server, and what hangs or is refused costs the others nothing."""

import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.stores import open_store
from kvlab.stores.wrappers import WrapperStore
from kvlab.tierworker import client as client_module
from kvlab.tierworker import host, lockfile, metrics, process
from kvlab.tierworker import server as server_module
from kvlab.tierworker.budget import Share
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.lockfile import ServersLock
from kvlab.tierworker.messages import Ask, Opening, message_of
from kvlab.tierworker.metrics import MetricsServer
from tests.support.gate import Gate
from tests.support.served import ROOT, Attached, connected, opened
from tests.tierworker.test_process import NAMESPACES, until


def is_ended(sock):
    sock.settimeout(30)
    try:
        return sock.recv(1000) == b""
    except OSError:
        return True


def test_a_number_in_place_of_a_path_closes_no_file_of_the_server(server):
    link = server_module.Link(connected(server))
    link.send({**message_of(Opening([], "naive", None, NAMESPACES)), "auth": server._lock})
    until(lambda: server.num_engines == 0 and server.num_attached == 1)
    os.fstat(server._lock)
    assert not ServersLock(str(server.path)).is_free()
    link.close()


def test_who_does_not_say_what_it_wants_is_left(server, monkeypatch):
    monkeypatch.setattr(server_module, "OPENING_S", 0.05)
    assert is_ended(connected(server))


def test_silent_sessions_take_no_place_of_others(server, monkeypatch):
    monkeypatch.setattr(host, "MAX_ENGINES", 3)
    silent = [connected(server) for _ in range(3)]
    until(lambda: server.num_attached == 3)
    engines = [Attached(server.path)]
    assert is_ended(silent[0])
    engines += [Attached(server.path) for _ in range(2)]
    assert all(map(is_ended, silent))
    until(lambda: len(server._sessions) == 3)
    with pytest.raises(StoreError, match="ended at its start"):
        Attached(server.path)
    for engine in engines:
        engine.client._worker.kill()


class Asked(WrapperStore):
    def __init__(self, inner):
        super().__init__(inner)
        self.calls, self.answers = [], threading.Event()

    def contains_many(self, keys):
        self.calls.append(len(keys))
        assert self.answers.wait(200)
        return [False] * len(keys)


def test_questions_end_with_their_session(server):
    store = server.store = Asked(server.store)
    link = opened(server)
    number = 400_000
    link.send(message_of(Ask(1, "", 1, number, False)), bytes(number * 17))
    (session, _), *_ = server._sessions.values()
    until(lambda: link.flush() and store.calls)
    link.close()
    until(lambda: session._has_ended)
    store.answers.set()
    until(lambda: session._question_bytes == 0)
    assert len(store.calls) == 1


def test_a_large_object_is_refused_before_it_takes_memory(server, engines):
    one, other = engines
    one.write("aa", [1, 3])
    assert one.wait("aa") == [True]
    server.limits.on_the_way.max_bytes = one.shared.slot_bytes * 3
    for slots in ([1, 3, 5, 7], range(4)):
        one.write("bb", slots)
        assert one.wait("bb") == [None], "it is answered that no tier has it"
        other.fill("bb", slots)
        assert other.wait("bb") == [""]
    other.fill("aa", [1, 3])
    assert other.wait("aa") == ["memory"]
    assert server.limits.on_the_way._held == one.client.counters["tier_worker_deaths"] == 0


def test_slots_of_all_engines_have_a_bound(server, caplog):
    server.limits.mapped = Share(1 << 20)
    one = Attached(server.path)
    one.write("aa", range(4))
    assert one.wait("aa") == [True]
    share = server.limits.mapped._taken
    server.limits.mapped.most = share + 1
    with caplog.at_level(logging.WARNING):
        other = Attached(server.path)
        until(lambda: other.client.counters["tier_worker_deaths"] == 1, other.client.poll)
    assert "all engines together may have" in caplog.text
    other.client.close()
    one.client.close()
    until(lambda: server.limits.mapped._taken == 0)
    again = Attached(server.path)
    again.fill("aa", range(4))
    assert again.wait("aa") == ["memory"]
    again.client.close()


def test_who_asks_for_what_an_object_is_not_costs_others_nothing(server, engines):
    one, other = engines
    one.write("aa", range(4))
    assert one.wait("aa") == [True]
    place = other._place
    for slots, end_token in ((range(4), 31), (range(3), 32), (range(8), 32)):
        other._place = lambda name, slots, end=end_token: (*place(name, slots)[:-1], end)
        other.fill("aa", slots)
        assert other.wait("aa") == [""]
        one.fill("aa", range(8, 12))
        assert one.wait("aa") == ["memory"]
    other._place = place
    other.fill("aa", range(4))
    assert other.wait("aa") == ["memory"]


def test_an_object_that_fits_none_is_replaced(server, engines):
    one, other = engines
    place = other._place
    other._place = lambda name, slots: (*place(name, slots)[:-1], 31)
    other.write("aa", range(4))
    assert other.wait("aa") == [True]
    one.fill("aa", range(4))
    assert one.wait("aa") == [""]
    answers = []
    one.client.ask(Ask(one.client.next_id(), "", 1, 1, False), b"\xaa" * 16 + b"\0", lambda *told: answers.append(told))
    until(lambda: answers, one.client.poll)
    assert answers[0][1] == b"\1", "to this engine it is missing"
    one.write("aa", range(8, 12))
    assert one.wait("aa") == [True]
    one.fill("aa", range(20, 24))
    assert one.wait("aa") == ["memory"]
    assert np.array_equal(one.shared.slots[20:24], one.bytes[8:12])


class HangingRows(WrapperStore):
    def __init__(self, inner):
        super().__init__(inner)
        self.is_asked, self.answers = threading.Event(), threading.Event()

    def rows(self):
        self.is_asked.set()
        assert self.answers.wait(200)
        return self.inner.rows()


def test_a_tier_that_hangs_holds_neither_engines_nor_the_stop_up(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "FIRST_LINE_S", 0.01)
    monkeypatch.setattr(client_module, "END_S", 0.05)
    store = HangingRows(open_store("memory://?size=1MiB&pinned=false"))
    server = CacheServer(store, tmp_path / "kvlab.sock")
    thread = threading.Thread(target=server.run)
    thread.start()
    assert store.is_asked.wait(60)
    engine = Attached(server.path)
    engine.write("aa", range(4))
    assert engine.wait("aa") == [True]
    server.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert not server.path.exists()
    store.answers.set()
    engine.client.close()


def test_a_stop_writes_what_is_queued(server, monkeypatch):
    monkeypatch.setattr(client_module, "END_S", 0.05)  # this process has the server's lock
    gate = server.store = Gate(server.store)
    engine = Attached(server.path)
    names = [f"{number:02x}" for number in range(60)]
    for name in names:
        engine.write(name, range(4))
    (session,) = [session for session, _ in server._sessions.values() if session.objects.store is gate]
    server.stop()
    until(lambda: session._is_left)
    gate.is_open.set()
    assert engine.wait(*names) == [True] * 60
    engine.client.close()


def test_what_a_stop_drops_is_counted(server, caplog, monkeypatch):
    monkeypatch.setattr(server_module, "DRAIN_STALL_S", 0.05)
    monkeypatch.setattr(client_module, "END_S", 0.05)
    gate = server.store = Gate(server.store)
    engine = Attached(server.path)
    for number in range(20):
        engine.write(f"{number:02x}", range(4))
    (session,) = [session for session, _ in server._sessions.values()]
    until(lambda: session.num_queued == 20)
    with caplog.at_level(logging.WARNING):
        server.stop()
        until(lambda: "dropped" in caplog.text)
    assert "20 writes of engines were not done in time" in caplog.text
    gate.is_open.set()
    engine.client.close()


def test_another_users_server_is_not_attached_to(server, monkeypatch):
    if os.geteuid() == 0:
        os.chown(server.path, 12345, -1)
    else:
        monkeypatch.setattr(process.os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match=r"belongs to user \d+, this process runs as \d+"):
        Attached(server.path)


def test_few_scrapes_at_a_time_and_none_for_long(server, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_SCRAPES", 3)
    with MetricsServer(server, "127.0.0.1:0") as served:

        def begun():
            sock = socket.create_connection(("127.0.0.1", served.port))
            sock.sendall(b"G")
            return sock

        socks = [begun() for _ in range(4)]
        assert is_ended(socks[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=20) as answer:
            assert b"kvlab_engines 0" in answer.read()
        monkeypatch.setattr(metrics, "SCRAPE_S", 0.05)
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            until(lambda: socks[3].sendall(b"x"))


def test_a_refused_start_leaves_no_socket_and_an_open_port_is_told(tmp_path):
    path = tmp_path / "kvlab.sock"
    line = [sys.executable, "-m", "kvlab", "serve", "--memory", "1MiB", "--listen", str(path), "--tcp"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    refused = subprocess.run([*line, "0.0.0.0:0"], capture_output=True, text=True, timeout=100, env=environment)
    assert refused.returncode == 2
    assert "has no password" in refused.stderr
    assert not path.exists()
    with subprocess.Popen([*line, "127.0.0.1:0"], stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert re.search("all users of this host can read and change the KV", running.stderr.readline())
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0


def test_a_close_does_not_wait_long_for_loads(command, monkeypatch):
    monkeypatch.setattr(client_module, "LOAD_GRACE_S", 0.05)
    monkeypatch.setattr(client_module, "END_S", 0.05)
    monkeypatch.setattr(client_module, "GRACE_S", 1e6)
    path, served = command()
    engine = Attached(path)
    served.send_signal(signal.SIGSTOP)
    engine.fill("aa", range(4))
    assert engine.client.close() is False
    served.send_signal(signal.SIGCONT)


def test_a_reader_of_the_lock_is_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(lockfile, "READERS_S", 0.05)
    path = tmp_path / "kvlab.sock"
    fd = os.open(tmp_path / "kvlab.sock.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    with pytest.raises(ConfigError, match="shared lock"):
        lockfile.hold(path)
    os.close(fd)
    os.close(lockfile.hold(path))


def test_a_path_that_is_too_long_is_told_with_the_limit(tmp_path):
    with open_store("memory://?size=1MiB&pinned=false") as store:
        long = Path("/tmp").joinpath("x" * 102)
        assert len(str(long)) == 107
        with pytest.raises(ConfigError, match="at most 106 bytes"):
            CacheServer(store, long)
