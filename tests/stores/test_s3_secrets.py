"""A secret planted as each credential of S3: no error, repr, log, output or cause of an error shows it."""

import pickle

import pytest
from planted import MARK, found
from s3_liars import S3Liar, answer, error

from kvlab.cli.store import main
from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError, StoreError
from kvlab.stores import open_store, open_stores
from kvlab.stores.s3.credentials import CredentialSource

NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
QUOTED = f"<Error><Code>{MARK}</Code><Message>{MARK}</Message><Key>{MARK}</Key></Error>".encode()
LIES = {
    "denied": error(403, "SignatureDoesNotMatch"),
    "quoted": answer(403, QUOTED),
    "quoted as a kind": answer(400, f"<{MARK}>".encode()),
    "quoted as a reason": f"HTTP/1.1 500 {MARK}\r\nContent-Length: 0\r\n\r\n".encode(),
    "quoted as a header": f"HTTP/1.1 200 OK\r\nContent-Length: {MARK}\r\n\r\n".encode(),
    "quoted as a status": f"{MARK}\r\n".encode(),
    "redirected": answer(307, Location=f"http://{MARK}/"),
    "quoted as a name": answer(
        200, f"<ListBucketResult><Contents><Key>{MARK}</Key><Size>{MARK}</Size></Contents></ListBucketResult>".encode()
    ),
    "hang up": lambda liar, sock, request: None,
}


@pytest.fixture(params=["environment", "file"])
def planted(request, monkeypatch, tmp_path):
    """Options of a URL that asks with the secret."""
    if request.param == "environment":
        for name in NAMES:
            monkeypatch.setenv(name, MARK)
        return ""
    file = tmp_path / "credentials"
    file.write_text("[default]\n" + "".join(f"{name.lower()} = {MARK}\n" for name in NAMES))
    return f"&credentials_file={file}"


@pytest.mark.parametrize("how", LIES)
def test_no_answer_brings_a_credential_out(how, planted, attempt):
    with S3Liar(dict.fromkeys(("GET", "PUT", "HEAD", "DELETE", "LIST"), LIES[how])) as liar:
        url = liar.url("timeout_ms=60000&retry_ms=1&longest_retry_ms=1") + planted
        calls = (
            lambda store: store.get("a"),
            lambda store: store.put("a", b"v"),
            lambda store: store.contains_many(["a", "b", "c"]),
            lambda store: list(store.keys()),
            lambda store: store.quarantine("a", "test", b"v"),
            lambda store: print(repr(store), str(store), store.stats(), store.rows(), store._repr_html_()),
        )
        for call in calls:

            def use(call=call):
                with open_store(url) as store:
                    call(store)

            attempt(use)
        attempt(lambda: main(["ls", url]))
        attempt(lambda: open_stores([url, "memory://"]).get("a"))
        sent = "".join(str(headers) for _, _, headers in liar.asked)
        assert found(sent), "the key's id and the token are sent"
        assert f"Credential={MARK}/" in sent


def test_nothing_that_holds_a_credential_shows_it(planted):
    with S3Liar() as liar, open_store(liar.url() + planted) as store:
        bucket = store._bucket
        credentials = bucket.target.credentials.get()
        for thing in (store, bucket, bucket.target, bucket.target.credentials, credentials, vars(store), vars(bucket)):
            assert not found(f"{thing!r} {thing!s}")
        assert not found(repr([vars(bucket.target), vars(bucket.target.credentials), store._as_call()]))
        assert pickle.loads(pickle.dumps(credentials)).session_token.reveal() == MARK


@pytest.mark.parametrize(
    "content",
    [
        f"{MARK}",
        f"[default]\n{MARK}",
        f"[default]\naws_access_key_id = {MARK}\n = {MARK}",
        f"[{MARK}]\naws_access_key_id = {MARK}\naws_secret_access_key = {MARK}",
        f"[default]\naws_access_key_id = a\naws_secret_access_key = {MARK}\n  {MARK}",
        f"[default]\naws_access_key_id = a\naws_secret_access_key = {MARK}\u00e9",
        f"[default\n{MARK} = {MARK}",
    ],
)
def test_a_broken_file_is_not_quoted(content, tmp_path, attempt):
    (tmp_path / "file").write_text(content)
    caught = attempt(lambda: open_store(f"s3://bucket?credentials_file={tmp_path}/file"))
    assert isinstance(caught, ConfigError)


@pytest.mark.parametrize(
    "url",
    [
        f"s3://user:{MARK}@bucket",
        f"s3://{MARK}@bucket",
        f"s3://bucket?secret_access_key={MARK}",
        f"s3://bucket?session_token={MARK}",
        f"s3://bucket?aws_secret={MARK}",
        f"s3://bucket?endpoint=http://user:{MARK}@h:9000",
        f"s3://bucket?credentials_file={MARK}",
        f"s3://bucket?endpoint={MARK}",
        f"s3://bucket?region={MARK}",
    ],
)
def test_a_url_holds_no_credential(url, attempt, monkeypatch):
    for name in NAMES[:2]:
        monkeypatch.setenv(name, "x")
    assert isinstance(attempt(lambda: open_store(url)), ConfigError)
    attempt(lambda: main(["ls", url]))
    attempt(lambda: vllm_config([url]))


def test_credentials_that_end_while_a_store_is_open_are_a_failure_of_the_store(tmp_path, attempt, monkeypatch):
    file = tmp_path / "file"
    file.write_text(f"[default]\naws_access_key_id = a\naws_secret_access_key = {MARK}\n")

    def use():
        with (
            S3Liar({"GET": error(403, "ExpiredToken")}) as liar,
            open_store(f"{liar.url('timeout_ms=60000&retry_ms=0')}&credentials_file={file}") as store,
        ):
            with pytest.raises(StoreError):
                store.get("a")
            file.write_text("[other]\n")
            store.get("a")

    caught = attempt(use)
    assert isinstance(caught, StoreError)
    assert caught.reason == "denied"


def test_a_source_is_asked_once():
    assert not found(repr(CredentialSource("/none", "profile")))
