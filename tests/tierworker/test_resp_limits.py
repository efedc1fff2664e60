"""What clients of the Redis protocol cannot take from each other: places, memory on the way, time."""

import socket
import threading

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.stores import open_store
from kvlab.tierworker import resp, resp_wire
from kvlab.tierworker.budget import Budget
from kvlab.tierworker.resp import RespServer
from tests.tierworker.test_process import until

PING = b"*1\r\n$4\r\nPING\r\n"
LARGE = 900_000


def serve(**options):
    return RespServer(open_store("memory://?size=16MiB&pinned=false"), "127.0.0.1:0", **options)


@pytest.fixture
def server():
    with serve() as server:
        server.budget = Budget(server.store, 1 << 20)
        with connected(server) as client:
            client.set("kvlab:a", bytes(LARGE))
        yield server


def connected(server, **options):
    return redis.Redis(port=server.port, socket_timeout=30, retry=Retry(NoBackoff(), 0), **options)


def raw(server, data=b""):
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(30)
    sock.sendall(data)
    return sock


def begun(size, more=b""):
    """A SET of so many bytes, as far as this."""
    return b"*3\r\n$3\r\nSET\r\n$7\r\nkvlab:b\r\n$%d\r\n" % size + more


def is_ended(sock):
    try:
        return sock.recv(100) == b""
    except OSError:
        return True


def test_strangers_take_no_place_of_those_who_know_the_password(monkeypatch):
    monkeypatch.setattr(resp, "MAX_STRANGERS", 3)
    monkeypatch.setattr(resp, "MAX_CONNECTIONS", 2)
    with serve(password="marker") as server, connected(server, password="marker") as known:
        assert known.ping()
        strangers = []
        for _ in range(20):
            strangers.append(raw(server, PING))
            assert strangers[-1].recv(100) == b"+PONG\r\n"
        assert sum(map(is_ended, strangers[:-3])) == 17
        assert known.ping()
        with connected(server, password="marker") as another:
            assert another.ping()
            with (
                connected(server, password="marker") as third,
                pytest.raises(redis.ConnectionError, match="max number"),
            ):
                third.ping()
        for sock in strangers:
            sock.close()


def test_a_stranger_has_its_time_whatever_it_sends(monkeypatch):
    monkeypatch.setattr(resp_wire, "STRANGER_S", 0.2)
    with serve(password="marker") as server, raw(server) as sock:

        def answers():
            sock.sendall(PING)
            return not is_ended(sock)

        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            until(lambda: not answers() and sock.sendall(PING))


def test_an_announcement_takes_no_memory_from_others(server):
    socks = [raw(server, begun(LARGE)) for _ in range(8)]
    with connected(server) as client:
        assert client.get("kvlab:a") == bytes(LARGE)
    for sock in socks:
        sock.close()


def test_who_stalls_gives_way_to_those_who_wait(server, monkeypatch):
    monkeypatch.setattr(resp_wire, "CROWDED_S", 0.1)
    with raw(server, begun(LARGE, bytes(LARGE - 1))) as sock:
        until(lambda: server.budget._held > LARGE // 2)
        with connected(server) as client:
            assert client.get("kvlab:a") == bytes(LARGE)
        assert is_ended(sock)


def test_small_words_count_as_large_ones(server, monkeypatch):
    """Half of an EXISTS, whose words are each too small for memory of their own."""
    monkeypatch.setattr(resp_wire, "CROWDED_S", 0.1)
    words = b"*500\r\n$6\r\nEXISTS\r\n" + 14 * (b"$65000\r\n" + bytes(65000) + b"\r\n")
    with raw(server, words) as sock:
        until(lambda: server.budget._held > LARGE // 2)
        with connected(server) as client:
            assert client.get("kvlab:a") == bytes(LARGE)
        assert is_ended(sock)


def test_values_that_arrive_at_once_all_arrive(server):
    """Together they are larger than the budget."""
    answers = []

    def put(number):
        with connected(server) as client:
            answers.append(client.set(f"kvlab:{number}", bytes([number]) * LARGE))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [True] * 8
    with connected(server) as client:
        assert all(client.get(f"kvlab:{number}") == bytes([number]) * LARGE for number in range(8))
    until(lambda: server.budget._held == 0)  # a reply is let go of once it is sent


@pytest.mark.parametrize("size", [60_000, LARGE])
def test_who_drips_is_left(server, monkeypatch, size):
    monkeypatch.setattr(resp_wire, "SILENCE_S", 0.2)
    with raw(server, begun(size)) as sock, pytest.raises(OSError, match=r"Broken pipe|reset"):
        until(lambda: sock.sendall(b"a"))


def test_a_value_that_is_too_large_is_answered(server):
    with connected(server) as client:
        for _ in range(2):
            with pytest.raises(redis.ResponseError, match="does not fit"):
                client.set("kvlab:b", bytes(3 << 20))
            assert client.get("kvlab:a") == bytes(LARGE)
    with open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=60000") as store:
        assert store.put("kvlab:b", bytes(3 << 20)) is False
        assert store.get("kvlab:a") == bytes(LARGE), "the server is not left alone for it"


def test_no_announcement_is_too_large_for_an_answer(server):
    with raw(server, begun(1 << 40)) as sock:
        assert sock.recv(100).startswith(b"-ERR Protocol error")


def test_scans_of_all_clients_are_few(server, monkeypatch):
    server._scans._most = 3
    with connected(server) as client:
        for number in range(1100):
            client.set(f"kvlab:{number}", b"y")
    clients = [connected(server) for _ in range(3)]
    cursors = [[client.scan(0)[0] for _ in range(2)] for client in clients]
    assert len(server._scans._open) == 3
    assert clients[2].scan(cursors[2][1])[0] == 0
    with pytest.raises(redis.ResponseError, match="dropped"):
        clients[0].scan(cursors[0][1])
    for client in clients:
        client.close()
    until(lambda: not server._scans._open)
