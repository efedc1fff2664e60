"""A bucket as a tier: the suite of all stores against a real server, URLs, credentials, conditions, lists."""

import itertools
import threading

import pytest

from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError, StoreError
from kvlab.machine.s3_server import BUCKET, S3Server
from kvlab.stores import check_url, open_store
from kvlab.stores.s3 import objects
from kvlab.stores.spec import TierSpec
from kvlab.testing import StoreTests

PATIENT = "&timeout_ms=60000"
count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.credentials.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def url(server):
    return server.url_of(f"test-{next(count)}") + PATIENT


class TestS3Store(StoreTests):
    persistent = True
    examples = 15

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.server = server

    def open(self, where, max_bytes):
        return open_store(self.server.url_of(f"{where.parent.name}/{where.name}") + PATIENT)


def test_stores_of_one_bucket_see_what_is_below_their_prefix_alone(url):
    below = url.replace("?", "/below?")
    with open_store(url) as store, open_store(below) as other:
        store.put("k", b"above")
        other.put("k", b"below")
        assert (list(store.keys()), list(other.keys())) == (["k"], ["k"])
        assert bytes(store.get("k")) == b"above"
        assert (store.used_bytes, other.used_bytes) == (5, 5)
        store.clear()
        assert bytes(other.get("k")) == b"below"


def test_a_list_has_pages(url, monkeypatch):
    monkeypatch.setattr(objects, "PAGE", 10)
    keys = [f"kvlab:m:0:{index}" for index in range(35)] + ["k" * 500]
    with open_store(url) as store:
        for key in keys:
            store.put(key, b"12")
        assert sorted(store.keys()) == sorted(keys)
        assert store.used_bytes == 72
        assert store.contains_many([*keys, "absent"]) == [True] * 36 + [False]
        store.clear()
        assert list(store.keys()) == []


def test_writers_of_one_key_agree_on_the_first_value(url):
    with open_store(url + "&keep_first=true") as one, open_store(url + "&keep_first=true") as other:
        stores = [one, other] * 4
        threads = [
            threading.Thread(target=store.put, args=("k", f"writer {index}".encode()))
            for index, store in enumerate(stores)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = bytes(one.get("k"))
        assert one.put("k", b"later") is True
        assert bytes(other.get("k")) == first
        assert one.stats()["kept"] + other.stats()["kept"] + one.counters.refused + other.counters.refused == 8
        assert one.quarantine("k", "checksum", first)
        assert one.put("k", b"good")
        assert bytes(other.get("k")) == b"good"


def test_a_value_that_comes_between_look_and_removal_stays(url, monkeypatch):
    with open_store(url) as store, open_store(url) as other:
        store.put("k", b"broken")
        remove = store._objects.remove

        def later(*args):
            other.put("k", b"good")
            return remove(*args)

        monkeypatch.setattr(store._objects, "remove", later)
        assert store.quarantine("k", "checksum", b"broken") is False
        assert bytes(other.get("k")) == b"good"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (f"s3://{BUCKET}?size=10GiB", "lifecycle rules"),
        ("s3://user:pw@bucket", "must hold no credentials"),
        ("s3://bucket?secret_access_key=x", "must hold no credentials"),
        ("s3://", "name the bucket"),
        ("s3://Bucket_1/x", "name the bucket"),
        ("s3://bucket?endpoint=ftp://h", "must be like http"),
        ("s3://bucket?endpoint=h:9000", "must be like http"),
        ("s3://bucket?endpoint=http://h:99999", "must be like http"),
        ("s3://bucket?endpoint=http://h/path", "must be like http"),
        ("s3://bucket?endpoint=http://h&ca_file=/x", "for an endpoint with https"),
        ("s3://bucket?region=a b", "region must be"),
        ("s3://bucket/a//b", "the prefix of"),
        ("s3://bucket/../b", "the prefix of"),
        ("s3://bucket/" + "p" * 600, "the prefix of"),
        ("s3://bucket?credentials_file=x", "absolute path"),
        ("s3://bucket?end_point=x", "unknown option"),
        ("s3://bucket?timeout_ms=x", "milliseconds"),
    ],
)
def test_a_wrong_url_says_what_to_do(wrong, words, server):
    for check in (open_store, check_url):
        with pytest.raises(ConfigError, match=words):
            check(wrong)


def test_a_url_is_known_wherever_tiers_are(monkeypatch, tmp_path):
    """Also where neither the credentials nor the files are: on another host."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    url = "s3://bucket/kv?endpoint=https://h:9000&region=eu-1&credentials_file=/none&ca_file=/none&keep_first=true"
    check_url(url)
    assert vllm_config(["memory://?size=1GiB", url])["kv_connector_extra_config"]["tiers"][1] == url
    spec = TierSpec.parse(url + "&gb_per_s=1&latency_ms=20")
    assert (spec.name, spec.size_bytes, spec.gb_per_s) == ("s3://bucket/kv", None, 1.0)
    with pytest.raises(ConfigError, match="cannot use the ca_file"):
        open_store(url)


INI = """[default]
aws_access_key_id = wrong
aws_secret_access_key = %wrong
[team]
aws_access_key_id = {0.access_key}
aws_secret_access_key = {0.secret_key}
"""


def test_credentials_come_from_where_aws_tools_find_them(server, monkeypatch, tmp_path):
    def reason(options=""):
        try:
            with open_store(server.url_of("credentials") + PATIENT + options) as store:
                store.put("k", b"v")
                return "ok"
        except StoreError as error:
            return error.reason
        except ConfigError:
            return "none"

    file = tmp_path / ".aws" / "credentials"
    file.parent.mkdir()
    file.write_text(INI.format(server))
    assert reason() == "ok", "of the environment"
    assert reason(f"&credentials_file={file}") == "denied", "a file that the URL names goes first"
    assert reason(f"&credentials_file={file}&profile=team") == "ok"
    for name in server.credentials:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reason() == "denied"
    assert reason("&profile=team") == "ok"
    assert reason("&profile=absent") == "none"
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert reason() == "ok"
    file.rename(tmp_path / "elsewhere")
    assert reason() == "none"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "elsewhere"))
    assert reason() == "ok"
    for content in (b"\xff\xfe", b"no section\n", b"x" * (2 << 20)):
        (tmp_path / "elsewhere").write_bytes(content)
        assert reason() == "none"


def test_credentials_that_were_replaced_are_read_again(server, monkeypatch, tmp_path):
    """Those of a session end; a process beside writes new ones."""
    file = tmp_path / "credentials"
    file.write_text(INI.format(server))
    url = server.url_of("replaced") + f"{PATIENT}&retry_ms=0&credentials_file={file}"
    with open_store(url) as store:
        with pytest.raises(StoreError) as caught:
            store.get("k")
        assert caught.value.reason == "denied"
        file.write_text(INI.format(server).replace("[default]", "[old]").replace("[team]", "[default]"))
        assert store.put("k", b"v")
        file.unlink()
        assert bytes(store.get("k")) == b"v", "they are kept while they are good"
