"""Answers are those of a real Redis."""

import socket

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.machine.redis_server import RedisServer
from kvlab.stores import open_store
from kvlab.tierworker.resp import RespServer

KEY, VALUE = "kvlab:a", b"0123456789"


@pytest.fixture(scope="module")
def both():
    """A client of this server, and one of Redis."""
    with (
        RespServer(open_store("memory://?size=16MiB&pinned=false"), "127.0.0.1:0") as server,
        RedisServer() as real,
        redis.Redis(port=server.port, protocol=2) as ours,
        redis.Redis(port=real.port, protocol=2) as theirs,
    ):
        for client in (ours, theirs):
            client.set(KEY, VALUE)
        yield ours, theirs


def answer(client, *command):
    try:
        return client.execute_command(*command)
    except redis.ResponseError as error:
        return str(error)


def test_ranges(both):
    for name in (KEY, "kvlab:none"):
        for first in range(-13, 14):
            for last in range(-13, 14):
                ours, theirs = (answer(client, "GETRANGE", name, first, last) for client in both)
                assert ours == theirs, (name, first, last)


@pytest.mark.parametrize(
    "options",
    [
        "PX",
        "EX",
        "EX abc",
        "PX 0",
        "EX -1",
        "EX 1.5",
        "NOPE",
        "EX 10 PX 10",
        "KEEPTTL EX 10",
        "EX 100",
        "px 5000",
        "KEEPTTL",
    ],
)
def test_options_of_set(both, options):
    ours, theirs = (answer(client, "SET", "kvlab:b", "v", *options.split()) for client in both)
    assert ours == theirs


def test_a_lock_that_would_not_expire_is_refused(both):
    assert "syntax" in answer(both[0], "SET", "kvlab:lock", "v", "NX", "PX", "100")
    assert answer(both[0], "GET", "kvlab:lock") is None


def test_hello(both):
    ours, theirs = (answer(client, "HELLO", 2) for client in both)
    assert ours[::2] == theirs[::2]
    for version in ("1", "4", "x"):
        assert "NOPROTO" in answer(both[0], "HELLO", version) or "unsupported" in answer(both[0], "HELLO", version)


@pytest.mark.parametrize("options", [{}, {"protocol": 3}, {"protocol": 2}, {"client_name": "me", "protocol": 3}])
def test_a_client_with_its_defaults(options):
    """Which may say HELLO 3, and with a password says it within."""
    for password in ("", "marker"):
        with RespServer(open_store("memory://?size=16MiB&pinned=false"), "127.0.0.1:0", password=password) as server:
            with redis.Redis(port=server.port, password=password or None, **options) as client:
                assert client.set(KEY, VALUE)
                assert client.get(KEY) == VALUE
                assert client.get("kvlab:none") is None
                assert client.pipeline(transaction=False).get(KEY).get("kvlab:none").execute() == [VALUE, None]
                assert client.info("memory")["maxmemory"] == 16 << 20
                assert list(client.scan_iter("kvlab:*")) == [KEY.encode()]
            if password:
                once = Retry(NoBackoff(), 0)
                client = redis.Redis(port=server.port, password="wrong", retry=once, **options)
                with client, pytest.raises(redis.AuthenticationError):
                    client.ping()
                with socket.create_connection(("127.0.0.1", server.port)) as sock:
                    sock.sendall(b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n")
                    assert sock.recv(100).startswith(b"-NOAUTH")
