"""What this reader cannot use and another could stays in its tier: only what is broken for every reader leaves it."""

import pytest
import torch

from kvlab import serde as serdes
from kvlab.auth import AuthKey
from kvlab.container import pack
from kvlab.geometry import AXES, KVGeometry
from kvlab.hashing import Namespace
from kvlab.object_cache import ObjectCache
from kvlab.serde import get_serde
from kvlab.serde.cachegen import CacheGenSerde
from kvlab.serde.tables import profile
from kvlab.serde.wire import to_parts
from kvlab.stated import token_range
from kvlab.stores import open_store
from tests.forged import data_of, forged, header_of
from tests.serde.kinds import serde_of
from tests.support.objects import IDS, engine_on, kv_of, put, reason


@pytest.fixture
def store():
    return open_store("memory://?size=64MiB")


def changed(name, text):
    """The metadata field `name` of an object changed, under a right checksum."""

    def change(value, engine):
        header = header_of(value)
        header["__metadata__"][name] = text
        return forged(header, data_of(value))

    return change


def of_version_3(value, engine):
    return value.replace(b'{"__metadata__":{"kvlab":"2"', b'{"__metadata__":{"kvlab":"3"', 1)


def with_tables(value, engine):
    kv = torch.randn(3, 32, 2, 2, 16)
    parts, metadata = to_parts(serde_of("cachegen").encode(kv, AXES))
    metadata |= {"namespace": engine.namespace.canonical, **token_range(0, 32)}
    return b"".join(pack(header_of(value)["__metadata__"]["key"], parts, metadata))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_version_3, "version"),
        (changed("serde", "of-a-later-version"), "serde"),
        (changed("serde", "needs-a-package"), "serde"),
        (changed("serde", "raises"), "error"),
        (with_tables, "serde"),  # none were given
    ],
)
def test_what_this_reader_cannot_read_stays_for_others(store, change, expected, monkeypatch):
    engine = engine_on(store)
    monkeypatch.setitem(serdes.SERDES, "needs-a-package", "a_package_that_is_absent:Serde")
    monkeypatch.setitem(serdes.SERDES, "raises", f"{__name__}:Raises")
    engine.save(IDS[:32], kv_of(32))
    (key,) = engine.lookup(IDS[:32]).keys
    value = change(bytes(store.get(key)), engine)
    store.put(key, value)
    for count in (1, 2):
        assert engine.load(IDS[:32]) == (0, None)
        assert engine.counters.misses == {expected: count}
    assert engine.save(IDS[:32], kv_of(32)) == 32
    assert bytes(store.get(key)) == value, "neither set aside nor replaced"


class Raises(type(get_serde("naive"))):
    name = "raises"

    def decode(self, encoded, out=None):
        raise ZeroDivisionError("planted")


def test_an_object_of_other_tables_stays_for_those_who_have_them(store):
    kv, place = torch.randn(3, 32, 2, 2, 16), {"axes": AXES, "first_token": 0, "end_token": 32}
    right, other = engine_on(store), engine_on(store)
    right.serde = serde_of("cachegen")
    right._serdes = {"cachegen": right.serde}
    other._serdes = {"cachegen": CacheGenSerde(profile([torch.randn(3, 40, 2, 2, 16)], AXES, level=0.5))}
    assert right.save_object("k", kv, AXES, first_token=0, end_token=32)
    assert other.load_object("k", **place) is None
    assert reason(other) == "table"
    assert right.load_object("k", **place) is not None


def test_a_reader_with_a_wrong_geometry_takes_nothing_from_the_others(store):
    engine_on(store).save(IDS, kv_of(64))
    for wrong in ({"num_layers": 3}, {"dtype": "float16"}, {"head_dim": 1, "num_kv_heads": 1}):
        shape = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 8, "dtype": "float32", **wrong}
        assert engine_on(store, geometry=KVGeometry(**shape)).load(IDS) == (0, None)
    assert torch.equal(engine_on(store).load(IDS)[1], kv_of(64))


def test_one_wrong_object_takes_none_of_the_right_ones_with_it(store):
    """Which of two objects that contradict each other is wrong, a reader without a geometry cannot tell."""
    engine = engine_on(store)
    engine.save(IDS, kv_of(64))
    first, second = engine.lookup(IDS).keys
    put(engine, first, kv_of(32, layers=3), 0, 32)
    assert engine.load(IDS)[0] == 32
    assert store.contains(second)


def test_without_the_key_in_its_name_another_key_may_be_right(store):
    """A cache whose namespace does not say which key signs its objects."""
    writer, reader = (
        ObjectCache(store, namespace=Namespace("m"), auth=AuthKey(bytes([number]) * 32)) for number in (1, 2)
    )
    place = {"axes": AXES, "first_token": 0, "end_token": 32}
    assert writer.save_object("k", kv_of(32), AXES, first_token=0, end_token=32)
    assert reader.load_object("k", **place) is None
    assert reason(reader) == "auth"
    assert writer.load_object("k", **place) is not None
