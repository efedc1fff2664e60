"""A server that lies: whatever it answers is a value, a miss or StoreError, within the deadline and in little memory,
and its connection is not used again."""

import contextlib
import tracemalloc

import pytest
from s3_liars import BUCKET, S3Liar, answer, error, listed
from servers import wait_for

from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.base import ValueTooLongError

PATIENT = "timeout_ms=60000&retry_ms=1&longest_retry_ms=1&limit=1MiB"


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def endless(first, more):
    def lie(liar, sock, request):
        sock.sendall(first)
        while not liar.closed.is_set():
            sock.sendall(more)

    return lie


def then_hang_up(data):
    return lambda liar, sock, request: sock.sendall(data)


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]><ListBucketResult><Contents><Key>&j;</Key></Contents></ListBucketResult>"
)
LIES = {
    "garbage": b"\x00\xff\x17hello\r\n",
    "empty line": b"\r\n",
    "another protocol": b"-ERR unknown command\r\n",
    "HTTP/0.9": b"value of a",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "status of no number": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "status 999": b"HTTP/1.1 999 OK\r\nContent-Length: 0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\nvalue of a",
    "length of -1": answer(200, Content_Length=-1),
    "length with a sign": answer(200, b"value of a", Content_Length="+10"),
    "length in other digits": b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n",
    "length of 5,000 digits": answer(200, Content_Length="9" * 5000),
    "length of 2^62": answer(200, Content_Length=1 << 62),
    "length of 2 GiB": answer(200, Content_Length=2 << 30),
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 10\r\n\r\nvalue of a",
    "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "cut body": then_hang_up(answer(200, b"value", Content_Length=1000)),
    "body longer than said": answer(200, b"value of a" * 5, Content_Length=10),
    "two answers": answer(200, b"value of a") * 2,
    "chunk of 4 GiB": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nabc",
    "chunk of no number": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc",
    "chunk longer than said": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcdef\r\n0\r\n\r\n",
    "100 MB of headers": endless(b"HTTP/1.1 200 OK\r\n", (b"X-A: " + b"x" * 900 + b"\r\n") * 99),
    "header without end": endless(b"HTTP/1.1 200 OK\r\nX-A: ", b"x" * 10_000),
    "short headers without end": endless(b"HTTP/1.1 200 OK\r\n", b"a:\r\n" * 1000),
    "header without colon": b"HTTP/1.1 200 OK\r\nhello\r\n\r\n",
    "folded header": b"HTTP/1.1 200 OK\r\nA: b\r\n c: d\r\n\r\n",
    "goes on for ever": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "hang up": lambda liar, sock, request: None,
    "no content": answer(204, Content_Length=None),
    "not modified": answer(304, Content_Length=None),
    "redirect without a place": answer(307),
    "XML bomb": answer(200, BOMB),
    "XML bomb as error": answer(500, BOMB),
    "XML of depth 100,000": answer(200, b"<a>" * 100_000),
    "XML cut off": answer(200, b"<ListBucketResult><Contents><Key>a"),
    "XML in no encoding": answer(200, b'<?xml version="1.0" encoding="none-such"?><a/>'),
    "list of no kind": answer(200, b"<ListBucketResult/>"),
    "list without sizes": answer(200, b"<ListBucketResult><Contents><Key>a</Key></Contents></ListBucketResult>"),
    "list with a size of -1": listed([("kv/a.safetensors", -1)]),
    "list with a name of 1 MiB": listed([("x" * (1 << 20), 1)]),
    "list of 50,000 names": listed([("kv/a.safetensors", 1)] * 50_000),
    "list that goes on without a token": answer(
        200, b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"
    ),
    "list that repeats its token": listed([], token="again"),
    **{f"error {status} {code}": error(status, code) for status, code in
       [(400, "Made-Up"), (400, "ExpiredToken"), (403, "AccessDenied"), (404, "NoSuchBucket"), (409, "Conflict"),
        (412, "PreconditionFailed"), (413, "EntityTooLarge"), (416, "InvalidRange"), (500, "InternalError"),
        (501, "NotImplemented"), (503, "SlowDown"), (507, "")]},
}  # fmt: skip
CALLS = {
    "get": lambda store: store.get("a"),
    "get_into": lambda store: store.get_into("a", memoryview(bytearray(100))),
    "get_head": lambda store: store.get_head("a", 5),
    "size_of": lambda store: store.size_of("a"),
    "contains_many": lambda store: store.contains_many(["a", "b", "c", "d"]),
    "put": lambda store: store.put("p", [b"x" * 100, b"y" * 100_000]),
    "delete": lambda store: store.delete("a"),
    "quarantine": lambda store: store.quarantine("a", "test", b"value of a"),
    "keys": lambda store: list(store.keys()),
    "used_bytes": lambda store: store.used_bytes,
    "clear": lambda store: store.clear(),
}


REASONS = {
    *("", "value too long", "bad_request", "conflict", "denied", "disconnected", "full", "left_alone", "no_bucket"),
    *("no_key", "not_implemented", "precondition", "protocol", "range", "redirected", "server_error", "throttled"),
    *("timeout", "too_large", "truncated"),
}


def outcome(call, store):
    try:
        call(store)
    except ValueTooLongError:
        return "value too long"
    except StoreError as error:
        return error.reason
    return ""


def recovers(liar, store):
    """Once the server is honest, so are the answers."""
    liar.lies = {}
    liar.data = {"kv/a.safetensors": b"value of a", "kv/b.safetensors": b"value of b"}

    def right():
        with contextlib.suppress(StoreError):
            value = store.get("a")
            is_right = value is not None and bytes(value) == b"value of a"
            return is_right and store.contains_many(["b", "c"]) == [True, False]
        return False

    wait_for(right, "the store to recover")


@pytest.mark.parametrize("how", LIES)
def test_a_lie_is_a_value_a_miss_or_an_error(how):
    """Memory is what tells whether a lie was believed: no buffer is taken for what cannot be."""
    every = dict.fromkeys(("GET", "HEAD", "PUT", "DELETE", "LIST"), LIES[how])
    with (
        S3Liar(every) as liar,
        open_store(liar.url("timeout_ms=1000&retry_ms=1&longest_retry_ms=1&limit=1MiB")) as store,
    ):
        tracemalloc.start()
        try:
            reasons = {outcome(call, store) for call in CALLS.values()}
            assert tracemalloc.get_traced_memory()[1] < 40 << 20
        finally:
            tracemalloc.stop()
        assert reasons <= REASONS
        recovers(liar, store)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (then_hang_up(answer(200, b"value", Content_Length=1000)), "truncated"),
        (then_hang_up(b"HTTP/1.1 200 OK\r\nContent-Le"), "disconnected"),
        (endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 100), "protocol"),
        (b"HTTP/1.1 200 OK\r\n\r\nvalue of a", "protocol"),
        (lambda liar, sock, request: liar.closed.wait(60) and None, "timeout"),
        (error(403, "SignatureDoesNotMatch"), "denied"),
        (error(400, "ExpiredToken"), "denied"),
        (error(403, "RequestTimeTooSkewed"), "clock"),
        (error(404, "NoSuchBucket"), "no_bucket"),
        (error(503, "SlowDown"), "throttled"),
        (error(429, ""), "throttled"),
        (error(500, "InternalError"), "server_error"),
        (error(400, "made-up"), "bad_request"),
        (error(301, "PermanentRedirect"), "redirected"),
    ],
)
def test_each_failure_has_its_reason(lie, reason):
    """A failure of the server is told once: calls behind it do not ask for a while."""
    patience = "timeout_ms=60000" if reason != "timeout" else "timeout_ms=200"
    with (
        S3Liar({"GET": lie}) as liar,
        open_store(liar.url(f"{patience}&retry_ms=60000&longest_retry_ms=60000")) as store,
    ):
        with pytest.raises(StoreError) as caught:
            store.get("a")
        assert caught.value.reason == reason
        assert store.stats()[f"error_{reason}"] == 1
        asked = len(liar.asked)
        if reason != "bad_request":
            assert store.why_missing("a") == "tier_down"
            with pytest.raises(StoreError) as caught:
                store.get("a")
            assert caught.value.reason == "left_alone"
            assert len(liar.asked) == asked


def test_credentials_do_not_follow_a_redirect():
    with S3Liar() as other, S3Liar() as liar:
        for status in (301, 302, 303, 307, 308):
            liar.lies = {"GET": answer(status, Location=f"http://127.0.0.1:{other.port}/{BUCKET}/kv/a.safetensors")}
            with open_store(liar.url()) as store, pytest.raises(StoreError) as caught:
                store.get("a")
            assert caught.value.reason == "redirected"
            assert str(other.port) not in str(caught.value)
        assert other.connections == 0


def test_an_answer_byte_by_byte_ends_at_the_deadline():
    """Each byte comes in time; without a deadline for all of them this would never end."""
    dripped = []

    def drip(liar, sock, request):
        sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while not liar.closed.wait(0.02):
            sock.sendall(b"x")
            dripped.append(1)

    for method, call in {"GET": "get", "PUT": "put", "HEAD": "size_of", "LIST": "keys"}.items():
        with S3Liar({method: drip}) as liar, open_store(liar.url()) as store:
            with pytest.raises(StoreError) as caught:
                CALLS[call](store)
            assert caught.value.reason == "timeout"
            recovers(liar, store)


def test_many_lookups_have_one_deadline():
    """Each answer comes in time for a deadline of its own."""

    def late(liar, sock, request):
        liar.closed.wait(0.2)
        return liar.honest(request)

    with S3Liar({"HEAD": late}) as liar, open_store(liar.url("timeout_ms=500&retry_ms=1&longest_retry_ms=1")) as store:
        with pytest.raises(StoreError) as caught:
            store.contains_many([f"k{index}" for index in range(200)])
        assert caught.value.reason == "timeout"
        assert len(liar.asked) <= 16 * 4, "of 200"
        assert store.stats()["error_timeout"] == 1, "once for a call"


def test_a_list_without_end_ends(monkeypatch):
    monkeypatch.setattr("kvlab.stores.s3.objects.LISTING", 3)
    monkeypatch.setattr("kvlab.stores.s3.store.MOST_LISTED_BYTES", 100_000)
    pages = []

    def names(liar, sock, request):
        pages.append(request)
        fresh = [(f"kv/{1000 * len(pages) + index}.safetensors", 1) for index in range(500)]
        return listed(fresh, token=f"t{len(pages)}")

    def nothing(liar, sock, request):
        pages.append(request)
        return listed([], token=f"t{len(pages)}")

    for lie, reason in ((names, "protocol"), (nothing, "timeout")):
        with S3Liar({"LIST": lie}) as liar, open_store(liar.url()) as store:
            with pytest.raises(StoreError) as caught:
                store.keys()
            assert caught.value.reason == reason


def test_names_that_no_key_has_are_not_listed():
    with S3Liar() as liar, open_store(liar.url()) as store:
        names = ["kv/a.safetensors", "kv/b", "kv/%61.safetensors", "kv/x y.safetensors", "other/a.safetensors", "kv/"]
        digest = "kv/=" + "0" * 64 + ".safetensors"
        liar.data = dict.fromkeys([*names, digest, "kv/=00.safetensors", "kv/%FF%FE.safetensors"], b"v")
        assert list(store.keys()) == ["a"]
        assert store.used_bytes in (1, 2), "what is under a digest counts unasked"


def test_a_server_that_knows_no_ranges_gives_a_head_all_the_same():
    whole = lambda liar, sock, request: answer(200, b"value of a")  # noqa: E731
    with S3Liar({"GET": whole}) as liar, open_store(liar.url(PATIENT)) as store:
        for _ in range(3):
            assert store.get_head("a", 5) == b"value"
        assert store.get_head("a", 10) == b"value of a"


def test_a_condition_that_a_server_does_not_know_is_left_out():
    def only_plain(liar, sock, request):
        return error(501, "NotImplemented") if "if-match" in request[2] else liar.honest(request)

    with S3Liar({"DELETE": only_plain}) as liar, open_store(liar.url(PATIENT)) as store:
        assert store.quarantine("a", "checksum", b"value of a") is True
        assert liar.data == {}


def test_an_idle_connection_that_the_server_closed_is_replaced():
    """Also one that is closed as the request arrives, which is asked again once and not for ever."""

    def closes(liar, sock, request):
        sock.sendall(liar.honest(request))

    with S3Liar() as liar, open_store(liar.url(PATIENT)) as store:
        for _ in range(3):
            liar.lies = {"GET": closes}
            assert bytes(store.get("a")) == b"value of a"
        liar.lies = {}
        assert bytes(store.get("a")) == b"value of a"
        liar.lies = {"GET": lambda liar, sock, request: None}
        asked = len(liar.asked)
        with pytest.raises(StoreError) as caught:
            store.get("a")
        assert caught.value.reason == "disconnected"
        assert len(liar.asked) - asked == 2


def test_an_error_that_comes_before_the_body_is_read_is_that_error():
    """A server may answer and hang up while a long value is on its way."""

    class Hasty(S3Liar):
        def serve(self, sock):
            with contextlib.suppress(OSError), sock:
                sock.recv(1000)
                sock.sendall(error(403, "AccessDenied"))
                while not self.closed.is_set() and sock.recv(1 << 16):
                    pass

    with Hasty() as liar, open_store(liar.url("timeout_ms=60000&retry_ms=1")) as store:
        with pytest.raises(StoreError) as caught:
            store.put("p", bytes(20 << 20))
        assert caught.value.reason == "denied"


def test_pieces_are_sent_as_they_are():
    """No copy of a value is made: memory does not grow with it."""
    sent = []

    class Drain(S3Liar):
        def serve(self, sock):
            with contextlib.suppress(OSError), sock:
                room, size = bytearray(1 << 16), None
                while size is None or sum(sent) < size:
                    sent.append(sock.recv_into(room))
                    if size is None:
                        head, _, _ = bytes(room[: sent[0]]).partition(b"\r\n\r\n")
                        size = len(head) + 4 + 4 + (30 << 20) + 5
                sock.sendall(answer(200))

    pieces = [b"head", bytes(30 << 20), memoryview(bytearray(5))]
    with Drain() as liar, open_store(liar.url("timeout_ms=60000")) as store:
        tracemalloc.start()
        try:
            assert store.put("p", pieces)
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
        finally:
            tracemalloc.stop()
