"""Objects that are signed: one who can write to a tier but has no key cannot make one that is believed."""

import json
import logging
import os
import pickle
import stat

import pytest
import torch

import kvlab
from kvlab.auth import MAX_BYTES, MIN_BYTES, AuthKey, auth_key
from kvlab.chunking import Chunker
from kvlab.connectors import ConnectorConfig
from kvlab.container import Part, pack, unpack
from kvlab.engine import CacheEngine
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.stores import open_store
from tests.forged import data_of, forged, header_of

KEY, OTHER = AuthKey(b"a" * 32), AuthKey(b"b" * 32)
SECRET = bytes(range(65, 97))
IDS = list(range(64))


def object_of(auth, payload=bytes(range(200))):
    return b"".join(bytes(p) for p in pack("k", {"kv": Part("U8", (200,), memoryview(payload))}, {}, auth=auth))


def reason_of(value, auth):
    with pytest.raises(FormatError) as caught:
        unpack(value, "k", auth=auth)
    return caught.value.reason


def key_file(folder, content=SECRET, mode=0o600):
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


# ---- the object


def test_golden_macs():
    assert KEY.mac([b"kv", b"lab"]) == KEY.mac([b"kvlab"])
    assert KEY.mac([b"kvlab"]) == "835d4b81a11cf46d2d7c4fa6cfe973e04e3b6b8095a412b779ba02113dd1593c"
    assert (KEY.id, OTHER.id) == ("404407751194ff83", "0673fa4fbe869cb2")


def test_a_signed_object_is_read_with_its_key_and_no_other():
    value = object_of(KEY)
    assert bytes(unpack(value, "k", auth=KEY).parts["kv"].data) == bytes(range(200))
    assert reason_of(value, OTHER) == "auth"
    assert reason_of(object_of(None), KEY) == "auth"


def test_a_reader_without_a_key_checks_the_checksum_alone():
    assert bytes(unpack(object_of(KEY), "k").parts["kv"].data) == bytes(range(200))


def test_what_is_forged_with_a_right_checksum_is_not_believed():
    value = object_of(KEY)
    header, data = header_of(value), data_of(value)
    mac = header["__metadata__"]["mac"]
    other_data = bytes(200)
    assert reason_of(forged(header, other_data), KEY) == "auth"
    with_mac = forged(header, other_data).replace(b"0" * 64, mac.encode())
    assert reason_of(with_mac, KEY) == "checksum"  # the checksum covers the MAC
    for change in ({"first_token": "0"}, {"serde": "naive"}):
        changed = {**header, "__metadata__": {**header["__metadata__"], **change}}
        assert reason_of(resigned(changed, data, mac), KEY) == "auth"
    assert reason_of(resigned(header, other_data, mac), KEY) == "auth"
    assert resigned(header, data, mac) == value
    assert reason_of(resigned(header, data, "0" * 64), KEY) == "auth"


def resigned(header, data, mac):
    """A forged object that carries this MAC and a checksum over it."""
    import xxhash

    blank = forged(header, data).replace(
        header_of(forged(header, data))["__metadata__"]["checksum"].encode(), b"0" * 32
    )
    filled = blank.replace(b'"mac":"' + b"0" * 64, b'"mac":"' + mac.encode())
    digest = xxhash.xxh3_128(filled).hexdigest().encode()
    return filled.replace(b'"checksum":"' + b"0" * 32, b'"checksum":"' + digest)


def test_any_changed_bit_of_a_signed_object_is_seen():
    value = object_of(KEY)
    for at in [*range(400), *range(4090, len(value))]:
        broken = bytearray(value)
        broken[at] ^= 1 << at % 8
        with pytest.raises(FormatError):
            unpack(bytes(broken), "k", auth=KEY)


# ---- the key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_a_key_that_others_can_read_or_write_is_refused(tmp_path, mode):
    with pytest.raises(ConfigError, match="chmod 600"):
        AuthKey.from_file(key_file(tmp_path, mode=mode))


def test_a_key_of_another_user_is_refused(tmp_path, monkeypatch):
    path = key_file(tmp_path)
    original = os.fstat

    def another(descriptor):
        about = list(original(descriptor))
        about[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(about)

    monkeypatch.setattr("kvlab.auth.os.fstat", another)
    with pytest.raises(ConfigError, match="belongs to user"):
        AuthKey.from_file(path)


def test_what_is_no_key_file_is_one_clear_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "pipe", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match=r"auth key"):
            AuthKey.from_file(path)
    for size in (0, MIN_BYTES - 1, MAX_BYTES + 1):
        with pytest.raises(ConfigError, match=f"got {size}"):
            AuthKey.from_file(key_file(tmp_path, b"x" * size))
    assert auth_key(str(key_file(tmp_path))).id == AuthKey(SECRET).id


def test_the_secret_is_in_nothing_that_is_shown(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    path = key_file(tmp_path)
    key = AuthKey.from_file(path)
    with open_store("memory://?size=8MiB") as store:
        engine = CacheEngine(store, namespace="m", auth=key)
        kv = torch.randn(1, 256, 1, 2, 4)
        engine.save(list(range(256)), kv)
        (name,) = store.keys()
        stored = bytes(store.get(name))
        store.put(name, forged(header_of(stored), data_of(stored)))
        assert engine.load(list(range(256))) == (0, None)
        shown = f"{key} {key!r} {engine.namespace} {engine.stats()} {caplog.text} {ConnectorConfig((f'file:///x?auth={path}',))}"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    secrets = (SECRET, key._key)
    for secret in secrets:
        for text in (secret.hex(), secret.decode("latin1"), repr(secret)[2:-1]):
            assert text not in shown
        assert secret not in stored
    assert key.id in shown


# ---- the engine


@pytest.mark.parametrize("url", ["memory://?size=8MiB", "file://{}?size=8MiB"])
@pytest.mark.parametrize("serde", ["naive", "lossless"])
def test_only_what_was_signed_with_the_engines_key_is_served(tmp_path, url, serde):
    kv = torch.randn(2, 64, 1, 2, 8)
    chunker = Chunker(32, 8)
    with open_store(url.format(tmp_path)) as store:
        signing, other, plain = (
            CacheEngine(store, namespace="m", chunker=chunker, serde=serde, auth=auth) for auth in (KEY, OTHER, None)
        )
        signing.save(IDS, kv)
        count, back = signing.load(IDS)
        assert (count, torch.equal(back, kv)) == (64, True)
        out = torch.empty(2, 32, 1, 2, 8)
        keys = signing.lookup(IDS).keys
        assert signing.load_object(keys[0], out, axes=AXES, first_token=0, end_token=32) is out
        for engine in (other, plain):
            assert engine.load(IDS) == (0, None)
            assert signing.namespace.differing(json.loads(engine.namespace.canonical)) == ["auth"]
        # One who can write to the tier puts another KV under the engine's keys, with all that is public in the header.
        forger = CacheEngine(store, namespace=signing.namespace, chunker=chunker, serde=serde)
        assert forger.namespace == signing.namespace
        forger.save_object(keys[1], torch.zeros(2, 32, 1, 2, 8), AXES, first_token=32, end_token=64)
        count, back = signing.load(IDS)
        assert (count, torch.equal(back, kv[:, :32])) == (32, True)
        assert signing.stats()["miss_auth"] == 1


# ---- the connector


def test_tiers_name_the_key_file(tmp_path):
    path = key_file(tmp_path)
    tiers = ["memory://?size=1GiB", f"file:///kv?size=1GiB&auth={path}", f"redis://host?auth={path}&timeout_ms=5"]
    config = ConnectorConfig(tuple(tiers))
    assert config.auth.id == AuthKey(SECRET).id
    assert config.secondary_tiers == ("file:///kv?size=1GiB", "redis://host?timeout_ms=5")
    extra = kvlab.vllm_config(tiers)["kv_connector_extra_config"]
    assert json.loads(json.dumps(extra))["tiers"] == tiers
    assert ConnectorConfig().auth is None
    for wrong in ([tiers[1], "redis://host"], [tiers[1], f"redis://host?auth={path}x"]):
        with pytest.raises(ConfigError, match="one auth key file"):
            ConnectorConfig(tuple(wrong))
    with pytest.raises(ConfigError, match="cannot read the auth key file"):
        ConnectorConfig(("file:///kv?auth=/absent",))
