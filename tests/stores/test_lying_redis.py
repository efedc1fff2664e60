"""A server that lies: whatever it answers is a value, a miss or StoreError, within the deadline and in little memory,
and its connection is not used again."""

import contextlib
import random
import threading
import time
import tracemalloc

import pytest
from liars import Liar, bulk
from lying import URLS, recovers
from servers import wait_for

from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.redis import resp, topology
from kvlab.stores.redis import store as redis_store
from kvlab.stores.redis.url import PASSWORD

REPLIES = {
    "garbage": b"\x00\xff\x17hello\r\n",
    "empty line": b"\r\n",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "status": b"+OK\r\n",
    "other status": b"+QUEUED\r\n",
    "integer": b":5\r\n",
    "negative integer": b":-7\r\n",
    "integer of 5,000 digits": b":" + b"9" * 5000 + b"\r\n",
    "integer with sign": b":+1\r\n",
    "integer in other digits": ":٣\r\n".encode(),
    "null": b"$-1\r\n",
    "null array": b"*-1\r\n",
    "bulk of 2^62": b"$4611686018427387904\r\n",
    "bulk of 2^36": b"$68719476736\r\n",
    "bulk of 2 GiB": b"$2147483648\r\n",
    "bulk of -5": b"$-5\r\n",
    "bulk of 5,000 digits": b"$" + b"9" * 5000 + b"\r\n",
    "bulk with underscore": b"$1_0\r\n0123456789\r\n",
    "bulk with sign": b"$+3\r\nabc\r\n",
    "bulk with blank": b"$ 3\r\nabc\r\n",
    "bulk longer than said": b"$3\r\nabcXY+OK\r\n",
    "bulk cut off": lambda liar, sock, args: sock.sendall(b"$1000\r\nabc"),
    "bulk of no text": bulk(b"\xff\xfe\n\x80"),
    "two replies": b"$3\r\nabc\r\n$3\r\ndef\r\n",
    "array of 2^40": b"*1099511627776\r\n" + b"$-1\r\n" * 2_000,
    "array of strings": b"*2000000\r\n" + bulk(bytes(20_000)) * 60,
    "arrays in arrays": b"*1\r\n" * 100_000,
    "array of an array": b"*1\r\n*1\r\n*1\r\n$3\r\nabc\r\n",
    "array of a bulk": b"*1\r\n$3\r\nabc\r\n",
    "array of two of the wrong kind": b"*2\r\n:1\r\n+OK\r\n",
    "line without end": b"+" + b"a" * 200_000,
    "hang up": lambda liar, sock, args: None,
    **{f"error {word}": f"-{word} x y z\r\n".encode() for word in
       ("LOADING", "READONLY", "OOM", "NOAUTH", "MOVED", "ASK", "WRONGTYPE", "ERR", "BUSY", "made-up", "")},
    "moved nowhere": b"-MOVED\r\n",
    "moved to no port": b"-MOVED 1 127.0.0.1\r\n",
    "moved to port 99999": b"-MOVED 1 127.0.0.1:99999\r\n",
    "moved to port 5,000 digits": b"-MOVED 1 127.0.0.1:" + b"9" * 5000 + b"\r\n",
    "moved to a strange host": b"-ASK 1 a/b\x1b]:80\r\n",
    "error of more lines": b"-ERR x\n2026-01-01 INFO all is well\x1b[2J\r\n",
    "slots that are no numbers": b"*1\r\n*3\r\n$1\r\n0\r\n:5\r\n*2\r\n$1\r\nh\r\n:1\r\n",
    "slots without end": b"*1\r\n*3\r\n:0\r\n:1099511627776\r\n*2\r\n$1\r\nh\r\n:1\r\n",
    "slots backwards": b"*1\r\n*3\r\n:9\r\n:5\r\n*2\r\n$1\r\nh\r\n:1\r\n",
    "slots of nowhere": b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$3\r\n\xff/x\r\n:1\r\n",
    "slots of port 0": b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:0\r\n",
    "no slots": b"*0\r\n",
    "a master of no port": b"*2\r\n$1\r\nh\r\n$5\r\n00x10\r\n",
}  # fmt: skip
CALLS = {
    "get": lambda store: store.get("kvlab:a"),
    "get_into": lambda store: store.get_into("kvlab:a", memoryview(bytearray(100))),
    "contains_many": lambda store: store.contains_many(["kvlab:a", "kvlab:b", "kvlab:c"]),
    "size_of": lambda store: store.size_of("kvlab:a"),
    "put": lambda store: store.put("kvlab:p", b"z"),
    "delete": lambda store: store.delete("kvlab:q"),
    "touch": lambda store: store.touch(["kvlab:a"]),
    "renew": lambda store: store.renew(),
    "quarantine": lambda store: store.quarantine("kvlab:q", "test"),
    "keys": lambda store: list(store.keys()),
    "used_bytes": lambda store: store.used_bytes,
    "max_bytes": lambda store: store.max_bytes,
    "stats": lambda store: store.stats(),
}


@pytest.fixture(autouse=True)
def no_password(monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)


def judge(store, name):
    """One call: what it may answer, or StoreError with a reason of few; anything else raises here."""
    try:
        answer = CALLS[name](store)
    except StoreError as caught:
        error = caught
    else:
        error = None
    if error is not None:
        assert error.reason.replace("_", "").isalpha()
        assert str(error).isprintable()
        return
    if name == "get":
        assert answer is None or memoryview(answer).nbytes <= 1 << 20
    elif name == "contains_many":
        assert [type(found) for found in answer] == [bool] * 3
    elif name == "keys":
        assert all(isinstance(key, str) for key in answer)
    elif name in ("put", "delete", "quarantine"):
        assert type(answer) is bool
    elif name in ("used_bytes", "max_bytes"):
        assert type(answer) is int
        assert answer >= 0


ASKED = {  # what a lie is the answer to, and the calls that ask it
    "single": ((b"GET", b"EXISTS", b"STRLEN", b"SET", b"EVAL", b"TOUCH", b"SCAN", b"INFO", b"CONFIG"), [*CALLS]),
    "login": ((b"AUTH", b"SELECT"), ["get"]),
    "sentinel": ((b"SENTINEL",), ["get", "contains_many"]),
    "cluster": ((b"CLUSTER",), ["get", "contains_many"]),
    "redirected": ((b"ASKING", b"GET", b"EXISTS"), ["get", "contains_many"]),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("lie", REPLIES)
def test_a_lie_is_an_error_or_a_miss(asked, lie, caplog, monkeypatch):
    monkeypatch.setattr(resp, "MOST_ITEMS", 1_000)
    monkeypatch.setattr(resp, "MOST_BYTES", 1 << 20)
    commands, calls = ASKED[asked]
    url = URLS[{"login": "single", "redirected": "cluster"}.get(asked, asked)]
    with Liar() as liar, open_store(url.format(liar.port)) as store:
        if asked == "single":
            recovers(store)  # it is connected
        tracemalloc.start()
        try:
            liar.lies = dict.fromkeys(commands, REPLIES[lie])
            for name in calls:
                judge(store, name)
            assert tracemalloc.get_traced_memory()[1] < 20 << 20
        finally:
            tracemalloc.stop()
        liar.lies = {}
        recovers(store)
        assert "\x1b" not in caplog.text


@pytest.mark.parametrize("kind", URLS)
def test_random_replies(kind):
    draw = random.Random(11)

    def tree(depth=0):
        grow = [b"*%d\r\n" % draw.choice((0, 1, 2, 3)), b"*-1\r\n", b"*9\r\n"] if depth < 5 else []
        leaf = draw.choice(
            [
                *grow,
                *grow,
                *(b"$-1\r\n", b"+OK\r\n", b"+x\r\n", b"-ERR x\r\n", b"$5\r\nab", draw.randbytes(draw.randrange(12))),
                b":%d\r\n" % draw.choice((0, 1, 2, -1, 16383, 1 << 40)),
                bulk(draw.choice((b"", b"0", b"127.0.0.1", b"kvlab:a", b"\xff", b"x" * 300))),
                b"-MOVED 5 127.0.0.1:%d\r\n" % liar.port,
            ]
        )
        if leaf[:1] != b"*":
            return leaf
        return leaf + b"".join(tree(depth + 1) for _ in range(min(max(int(leaf[1:-2]), 0), 3)))

    def answer(liar, sock, args):
        lie = draw.random() < 0.4
        reply = tree() if lie else liar.honest(args)
        return reply if reply[-2:] == b"\r\n" else sock.sendall(reply)  # what is cut off ends with hanging up

    with Liar() as liar, open_store(URLS[kind].format(liar.port)) as store:
        commands = b"AUTH SELECT SENTINEL CLUSTER ASKING GET EXISTS STRLEN SET EVAL TOUCH SCAN INFO CONFIG".split()
        liar.lies = dict.fromkeys(commands, answer)
        for _ in range(300):
            judge(store, draw.choice([*CALLS]))
        liar.lies = {}
        liar.data[b"kvlab:a"] = b"value of a"
        recovers(store)


@pytest.mark.parametrize("kind", URLS)
@pytest.mark.parametrize("where", [b"AUTH", b"SELECT", b"GET", b"SCAN"])
def test_a_reply_byte_by_byte_ends_at_the_deadline(kind, where):
    """Each byte comes in time; without a deadline for all of them this would never end."""
    dripped = []

    def drip(liar, sock, args):
        sock.sendall(b"+")
        while not liar.closed.wait(0.02):
            sock.sendall(b"x")
            dripped.append(args[0])

    with Liar({where: drip}) as liar, open_store(URLS[kind].format(liar.port)) as store:
        if where == b"SELECT":
            store = open_store(URLS["single"].format(liar.port))
        while len(dripped) <= 2:  # on a busy machine a call may end before the third byte
            with pytest.raises(StoreError) as caught:
                list(store.keys()) if where == b"SCAN" else store.get("kvlab:a")
            assert caught.value.reason in ("timeout", "unreachable", "no_master", "left_alone")
        liar.lies = {}
        recovers(store)


def test_a_list_without_end_ends(monkeypatch):
    """SCAN that goes on for ever, with new names or with none."""
    monkeypatch.setattr("kvlab.stores.redis.listing.LISTING", 3)
    monkeypatch.setattr("kvlab.stores.redis.listing.MOST_LISTED_BYTES", 100_000)
    scans = []

    def names(liar, sock, args):
        scans.append(args)
        fresh = [b"kvlab:%d" % (1000 * len(scans) + index) for index in range(500)]
        return b"*2\r\n" + bulk(b"%d" % len(scans)) + b"*500\r\n" + b"".join(map(bulk, fresh))

    def nothing(liar, sock, args):
        scans.append(args)
        return b"*2\r\n$1\r\n7\r\n*0\r\n"

    for lie, reason in ((names, "protocol"), (nothing, "timeout")):
        with Liar({b"SCAN": lie}) as liar, open_store(URLS["single"].format(liar.port)) as store:
            with pytest.raises(StoreError) as caught:
                store.keys()
            assert caught.value.reason == reason
            assert store.errors[reason] == 1


def test_a_list_of_short_names_takes_bounded_memory(monkeypatch):
    """A Python string takes many times the bytes of a short name."""
    monkeypatch.setattr("kvlab.stores.redis.listing.MOST_LISTED_BYTES", 4 << 20)
    sent = []

    def names(liar, sock, args):
        sent.append(args)
        fresh = [b"kvlab:%x" % (5000 * len(sent) + index) for index in range(5000)]
        return b"*2\r\n" + bulk(b"%d" % len(sent)) + b"*5000\r\n" + b"".join(map(bulk, fresh))

    url = "redis://127.0.0.1:{}?timeout_ms=60000"
    with Liar({b"SCAN": names}) as liar, open_store(url.format(liar.port)) as store:
        tracemalloc.start()
        try:
            with pytest.raises(StoreError, match="more than 4 MiB of names"):
                store.keys()
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_names_that_no_key_has_are_not_listed():
    with Liar() as liar, open_store(URLS["single"].format(liar.port)) as store:
        liar.data = {b"kvlab:a": b"v", b"kvlab:\xff\xfe": b"v", b"kvlab:" + b"x" * 5000: b"v", b"kvlab::kvlab:b": b"v"}
        assert list(store.keys()) == ["kvlab:a"]


def test_replies_out_of_step_end_with_renew():
    """A stray reply shifts all that follow on its connection. The next read may come by another."""

    was_read, was_sent = threading.Event(), threading.Event()

    def stray(liar, sock, args):
        liar.lies = {}
        sock.sendall(liar.honest(args))
        was_read.wait(30)
        sock.sendall(bulk(b"value of b"))
        was_sent.set()
        return b""

    options = "timeout_ms=30000&retry_ms=1"
    with Liar({b"GET": stray}) as liar, open_store(f"redis://127.0.0.1:{liar.port}?{options}") as store:
        assert bytes(store.get("kvlab:a")) == b"value of a"
        was_read.set()
        was_sent.wait(30)
        try:
            assert bytes(store.get("kvlab:a")) == b"value of b", "out of step, or this shows nothing"
        except StoreError as caught:
            error = caught  # both replies came at once: it is noticed
        else:
            error = None
        assert error is None or error.reason == "protocol"
        store.renew()
        recovers(store)
        assert liar.connections == 2


def test_ever_new_nodes_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr(topology, "MOST_NODES", 8)
    moved = iter(range(1, 60_000))
    hosts = lambda: b"127.1.%d.%d" % divmod(next(moved), 250)  # noqa: E731
    for kind, lies in {
        "cluster": {b"GET": lambda liar, sock, args: b"-MOVED 5 %s:1\r\n" % hosts()},
        "sentinel": {b"SENTINEL": lambda liar, sock, args: b"*2\r\n" + bulk(hosts()) + bulk(b"1")},
    }.items():
        with Liar(lies) as liar, open_store(URLS[kind].format(liar.port)) as store:
            for _ in range(30):
                judge(store, "get")
            assert len(store._topology._by_address) <= 8
            liar.lies = {}
            recovers(store)


@pytest.mark.parametrize("told", [b"1", b"0", b"1048575", b"-1", b"x", b"1048576", b"4611686018427387904"])
def test_a_limit_that_no_server_has_is_not_believed_and_none_for_ever(told, monkeypatch):
    """Redis' own least is 1 MiB. A limit that may be one holds for a while: CONFIG SET and restarts change it."""
    monkeypatch.setattr(redis_store, "LIMIT_KEPT_S", 0.2, raising=False)
    lie = b"*2\r\n" + bulk(b"proto-max-bulk-len") + bulk(told)
    url = "redis://127.0.0.1:{}?timeout_ms=10000"
    with Liar({b"CONFIG": lie}) as liar, open_store(url.format(liar.port)) as store:
        assert store.put("kvlab:p", bytes(1 << 20))
        assert store.put("kvlab:p", bytes((1 << 20) + 1)) is (told != b"1048576")
        liar.lies = {}
        wait_for(lambda: store.put("kvlab:p", bytes((1 << 20) + 1)), "the limit to be asked for again")
        assert sum(asked[0] == b"CONFIG" for asked in liar.asked) <= 4, "not with every put"


def test_a_put_that_fails_asks_for_the_limit_again():
    """A server whose limit was lowered hangs up on a value that is too long for it."""
    with Liar() as liar, open_store(f"redis://127.0.0.1:{liar.port}?timeout_ms=10000&retry_ms=1") as store:
        assert store.put("kvlab:p", bytes(2 << 20))
        liar.lies = {
            b"CONFIG": b"*2\r\n" + bulk(b"proto-max-bulk-len") + bulk(b"1048576"),
            b"SET": lambda liar, sock, args: None,
        }
        with pytest.raises(StoreError):
            store.put("kvlab:p", bytes(2 << 20))
        time.sleep(0.01)
        assert store.put("kvlab:p", bytes(2 << 20)) is False
        assert store.errors["too_large"] == 1


@pytest.mark.parametrize("call", ["contains_many", "touch", "put", "used_bytes"])
def test_a_call_of_many_questions_has_one_deadline(call):
    """Each answer comes in time for a deadline of its own."""
    moved, waited = iter(range(8)), []

    def late(liar, sock, args):
        if args[0] in (b"EXISTS", b"TOUCH") and next(moved, None) is not None:
            return b"-MOVED 5 127.0.0.1:%d\r\n" % liar.port
        waited.append(args)
        liar.closed.wait(0.3)
        return liar.honest(args)

    def two_nodes(liar, sock, args):
        entry = b"*3\r\n:%d\r\n:%d\r\n*2\r\n" + b"%s:%d\r\n"
        entries = ((0, 8191, bulk(b"127.0.0.1"), liar.port), (8192, 16383, bulk(b"localhost"), liar.port))
        return b"*2\r\n" + b"".join(entry % place for place in entries)

    lies = {**dict.fromkeys((b"EXISTS", b"TOUCH", b"CONFIG", b"SET", b"INFO"), late), b"CLUSTER": two_nodes}
    url = "redis-cluster://127.0.0.1:{}?timeout_ms=400&retry_ms=1&longest_retry_ms=1"
    with Liar(lies) as liar, open_store(url.format(liar.port)) as store:
        keys = [f"kvlab:{index}" for index in range(8)]
        calls = {
            "contains_many": lambda: store.contains_many(keys),
            "touch": lambda: store.touch(keys),
            "put": lambda: store.put("kvlab:p", b"z"),
            "used_bytes": lambda: store.used_bytes,
        }
        while not waited:  # on a busy machine the deadline may pass before anything is asked
            with contextlib.suppress(StoreError):
                calls[call]()
        assert len(waited) <= 2
        assert store.errors["timeout"] >= 1


def test_facts_about_memory_are_short():
    """What INFO says is taken apart line by line."""
    with (
        Liar({b"INFO": bulk(b"used_memory:1\r\n" * 100_000)}) as liar,
        open_store(URLS["single"].format(liar.port)) as store,
    ):
        assert store.used_bytes == 0
        assert store.errors == {"protocol": 1}
