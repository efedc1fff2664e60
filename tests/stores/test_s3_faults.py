"""A real S3 server that fails: each failure is told by its own reason, within the deadline, and the tier comes back."""

import contextlib
import os
import socket

import pytest
import torch
from faults import Cutter, quietly, reason_of
from servers import paused, wait_for

from kvlab.engine import CacheEngine
from kvlab.errors import StoreError
from kvlab.machine.s3_server import BUCKET, S3Server
from kvlab.stores import open_store
from kvlab.stores.s3.names import name_of

PATIENT = "&timeout_ms=60000&retry_ms=1&longest_retry_ms=1"
HASTY = "&timeout_ms=300&retry_ms=1&longest_retry_ms=1"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    import trustme

    folder, ca = tmp_path_factory.mktemp("s3"), trustme.CA()
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for pem in issued.cert_chain_pems:
        pem.write_to_path(folder / "cert.pem", append=True)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    with (
        S3Server(folder, cert=str(folder / "cert.pem"), key=str(folder / "key.pem")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.credentials.items():
            patch.setenv(name, value)
        server.ca = folder / "ca.pem"
        yield server


def plain(server, port=0, bucket=BUCKET):
    return f"s3://{bucket}/faults?endpoint=http://127.0.0.1:{port or server.port}"


def test_a_server_killed_in_the_middle_of_a_value_and_back_again(server):
    value = os.urandom(30 << 20)
    cutter = Cutter(server.port, 1 << 20, server.kill)
    try:
        with open_store(plain(server, cutter.port) + PATIENT) as store, open_store(plain(server) + PATIENT) as direct:
            assert store.put("big", value)
            assert reason_of(lambda: store.get("big")) == "truncated"
            assert store.stats()["error_truncated"] == 1
            assert reason_of(lambda: direct.get("big")) in ("refused", "disconnected")
            assert reason_of(lambda: direct.put("other", b"v")) == "refused"
            assert direct.why_missing("big") == "tier_down"
            assert direct.used_bytes == 0, "as last known"
            server.start()

            def back():
                with contextlib.suppress(StoreError):
                    got = direct.get("big")
                    return got is not None and bytes(got) == value
                return False

            wait_for(back, "the server to serve what it had")
            assert direct.why_missing("absent") == "never_stored"
    finally:
        cutter.close()


def test_a_server_that_is_silent_costs_a_deadline(server):
    """Each call ends although nothing ever answers; then it is left alone."""
    with open_store(plain(server) + HASTY) as store:
        wait_for(lambda: quietly(store.put, "k", b"v"), "a quick answer")
        before = store.errors["timeout"]  # of a busy machine
        with paused(server.pid):
            calls = [
                lambda: store.get("k"),
                lambda: store.put("p", bytes(20 << 20)),
                lambda: store.contains_many([f"k{index}" for index in range(100)]),
                lambda: list(store.keys()),
                lambda: store.delete("k"),
                lambda: store.quarantine("k", "test", b"v"),
            ]
            for call in calls:
                assert reason_of(call) == "timeout"
            assert store.stats()["error_timeout"] == before + len(calls)

        def back():
            return bytes(quietly(store.get, "k") or b"") == b"v"

        wait_for(back, "the store to come back")


def test_wrong_credentials_are_denied(server, monkeypatch):
    for name, value in (("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "wrong")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with open_store(plain(server) + PATIENT) as store:
                for call in (
                    lambda: store.get("k"),
                    lambda: store.size_of("k"),
                    lambda: store.put("k", bytes(1 << 20)),
                ):
                    wait_for(lambda call=call: reason_of(call) == "denied", "a try")
                assert store.stats()["error_denied"] >= 3


def test_a_bucket_that_is_not_there(server):
    """This server makes a bucket for a first object; others answer to that, too, that there is none."""
    with open_store(plain(server, bucket="no-such-bucket") + PATIENT) as store:
        calls = [
            lambda: store.get("k"),
            lambda: store.size_of("k"),
            lambda: store.contains_many(["a", "b", "c"]),
            lambda: store.keys(),
        ]
        for call in calls:
            assert reason_of(call) == "no_bucket"
        assert store.stats()["error_no_bucket"] == len(calls)


def test_tls_is_verified(server):
    url = server.url_of("tls") + PATIENT
    with open_store(url) as store:
        assert reason_of(lambda: store.get("k")) == "tls"
    with open_store(f"{url}&ca_file={server.ca}") as store:
        value = os.urandom(3 << 20)
        assert store.put("k", [value[:5], value[5:]])
        room = bytearray(len(value))
        assert store.get_into("k", memoryview(room)) == len(value)
        assert room == value
        assert store.contains_many(["k", "a", "b", "c"]) == [True, False, False, False]
    with open_store(f"{url}&ca_file={server.ca}".replace("localhost", "127.0.0.1")) as store:
        assert reason_of(lambda: store.get("k")) == "tls", "the certificate is for another name"
    with open_store(plain(server, server.tls_port) + PATIENT) as store:
        assert reason_of(lambda: store.get("k")) in ("bad_request", "disconnected", "protocol")
    with open_store(plain(server).replace("http:", "https:") + PATIENT) as store:
        assert reason_of(lambda: store.get("k")) == "tls"


def test_no_server_and_no_host(server):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with open_store(plain(server, port) + PATIENT) as store:
        assert reason_of(lambda: store.get("k")) == "refused"
    with open_store(f"s3://{BUCKET}?endpoint=http://no-such-host.invalid{PATIENT}") as store:
        assert reason_of(lambda: store.get("k")) in ("unreachable", "timeout")


def test_garbage_where_an_object_was_is_a_miss(server):
    tokens = {"first_token": 0, "end_token": 16}
    pages, out = torch.randn(2, 16, 8), torch.empty(2, 16, 8)
    with open_store(plain(server).replace("faults", "garbage") + PATIENT) as store:
        engine = CacheEngine(store, namespace="m")
        key = engine.namespace.key(b"one")
        axes = ("layers", "tokens", "dims")
        for garbage in (b"", b"garbage", os.urandom(5000), bytes(100_000)):
            assert engine.save_object(key, pages, axes, **tokens)
            store.put(key, garbage)
            assert engine.load_object(key, out, axes=axes, **tokens) is None
            assert not store.contains(key), "set aside"
        assert store.counters.dropped == 4
        assert engine.save_object(key, pages, axes, **tokens)
        assert engine.load_object(key, out, axes=axes, **tokens) is not None
        assert torch.equal(out, pages)
        assert name_of(key).endswith(".safetensors")
