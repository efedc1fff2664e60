"""What is stored under a key is not what the reader asked for: a miss with its reason, whatever the checksum says."""

import builtins
import json

import pytest
import torch

from kvlab import serde as serdes
from kvlab.container import MAX_HEADER_BYTES
from kvlab.engine import CacheEngine
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.hashing import Namespace, cache_namespace
from kvlab.object_cache import MAX_TOKEN_BYTES
from kvlab.objects import MOST_GROWTH
from kvlab.serde import Encoded, get_serde, serde_to_read
from kvlab.serde.wire import from_parts, to_parts
from kvlab.stated import Expected
from kvlab.stores import open_store, open_stores
from kvlab.stores.wrappers import WrapperStore
from tests.forged import data_of, forged, header_of
from tests.serde.kinds import SPECS, serde_of
from tests.support.objects import CHUNKER, GEOMETRY, IDS, engine_on, kv_of, put, reason

PAGES = ("blocks", "layers", "page_bytes")


@pytest.fixture
def store():
    return open_store("memory://?size=64MiB")


@pytest.fixture(params=[None, GEOMETRY], ids=["no geometry", "geometry"])
def engine(store, request):
    return engine_on(store, geometry=request.param)


@pytest.mark.parametrize(
    ("kv", "first", "end", "expected"),
    [
        (kv_of(32), 0, 32, "wrong_range"),  # the first chunk in the place of the second
        (kv_of(64), 0, 64, "wrong_range"),
        (kv_of(16), 48, 64, "wrong_range"),
        (kv_of(16), 32, 64, "wrong_shape"),
        (kv_of(33), 32, 64, "wrong_shape"),
        (kv_of(32, layers=3), 32, 64, "wrong_shape"),
        (kv_of(32)[..., :4], 32, 64, "wrong_shape"),
        (kv_of(32, layers=0), 32, 64, "wrong_shape"),
        (kv_of(32, dtype=torch.bfloat16), 32, 64, "wrong_dtype"),
    ],
)
def test_a_chunk_that_is_another_than_its_place_says(engine, kv, first, end, expected):
    value = kv_of(64)
    engine.save(IDS, value)
    put(engine, engine.lookup(IDS).keys[1], kv, first, end)
    count, back = engine.load(IDS)
    assert (count, reason(engine)) == (32, expected)
    assert torch.equal(back, value[:, :32])
    stays = expected in ("wrong_shape", "wrong_dtype")  # another reader may expect just this
    assert engine.lookup(IDS).num_tokens == (64 if stays else 32)
    assert engine.save(IDS, value) == 64
    assert torch.equal(engine.load(IDS)[1], value)


def test_permuted_axes_of_the_same_shape(engine):
    engine.save(IDS[:32], kv_of(32))
    turned = ("kv_heads", "tokens", "layers", "kv", "head_dim")
    put(engine, engine.lookup(IDS[:32]).keys[0], kv_of(32), 0, 32, axes=turned)
    assert engine.load(IDS[:32]) == (0, None)
    assert reason(engine) == "wrong_axes"


def test_an_object_without_layers_or_numbers_is_no_kv(engine):
    for empty in (kv_of(32, layers=0), kv_of(32)[..., :0], kv_of(32)[:, :, :0]):
        engine.counters.misses.clear()
        put(engine, engine.namespace.key(engine.hashes(IDS)[3]), empty, 0, 32)
        assert engine.load(IDS) == (0, None)
        assert reason(engine) == "wrong_shape"


def test_a_reader_that_knows_the_number_of_axes_takes_no_other():
    parts, metadata = to_parts(get_serde("naive").encode(kv_of(32), AXES))
    with pytest.raises(FormatError) as caught:
        from_parts(parts, metadata, Expected(shape=(None, 32)))
    assert caught.value.reason == "wrong_shape"


def test_with_a_geometry_the_first_object_must_fit_it_too(store):
    engine = engine_on(store, geometry=GEOMETRY)
    for wrong, expected in ((kv_of(32, layers=3), "wrong_shape"), (kv_of(32, dtype=torch.float16), "wrong_dtype")):
        put(engine, engine.namespace.key(engine.hashes(IDS)[3]), wrong, 0, 32)
        engine.counters.misses.clear()
        assert engine.load(IDS) == (0, None)
        assert reason(engine) == expected
        with pytest.raises(ConfigError, match="as the engine's geometry says"):
            engine.save(IDS[:32], wrong)


@pytest.mark.parametrize("url", ["memory://?size=8MiB", "file://{}?size=8MiB"])
@pytest.mark.parametrize("serde", ["naive", "lossless"])
def test_pages_must_be_of_the_tokens_and_the_shape_that_are_asked_for(url, serde, tmp_path):
    pages = torch.randint(0, 256, (4, 2, 512), dtype=torch.uint8)
    with open_store(url.format(tmp_path)) as store:
        engine = engine_on(store, serde=serde)
        for out, place, expected in (
            (torch.empty_like(pages), (0, 64), "wrong_range"),
            (torch.empty_like(pages), (64, 96), "wrong_range"),
            (torch.empty(2, 4, 512, dtype=torch.uint8), (32, 64), "wrong_shape"),
            (torch.empty(4, 2, 512, dtype=torch.int8), (32, 64), "wrong_dtype"),
            (torch.empty(4, 2, 1024, dtype=torch.uint8), (32, 64), "wrong_shape"),
        ):
            assert engine.save_object("k", pages, PAGES, first_token=32, end_token=64)
            engine.counters.misses.clear()
            assert engine.load_object("k", out, axes=PAGES, first_token=place[0], end_token=place[1]) is None
            assert reason(engine) == expected
        assert engine.save_object("k", pages, PAGES, first_token=32, end_token=64)
        back = engine.load_object("k", torch.empty_like(pages), axes=PAGES, first_token=32, end_token=64)
        assert torch.equal(back, pages)


def test_a_caller_who_contradicts_himself_is_told(store):
    engine = engine_on(store)
    for first, end in ((0, 31), (-1, 31), (32, 32)):
        with pytest.raises(ConfigError):
            engine.save_object("k", kv_of(32), AXES, first_token=first, end_token=end)
        with pytest.raises(ConfigError):
            engine.load_object("k", kv_of(32), axes=AXES, first_token=first, end_token=end)


def test_sizes_of_chunks_and_blocks_and_the_key_are_in_the_namespace_once():
    plain = Namespace("m", {"dtype": "float32"})
    named = cache_namespace(plain, chunk_tokens=32, block_tokens=8)
    assert named.differing(json.loads(plain.canonical)) == ["block_tokens", "chunk_tokens"]
    assert cache_namespace(named, chunk_tokens=32, block_tokens=8) == named
    other = cache_namespace(plain, chunk_tokens=64, block_tokens=8, auth="00")
    assert named.differing(json.loads(other.canonical)) == ["auth", "chunk_tokens"]
    with pytest.raises(ConfigError, match="'chunk_tokens' must be 64, got 32"):
        cache_namespace(named, chunk_tokens=64, block_tokens=8)
    with pytest.raises(ConfigError, match="shorten a field"):
        Namespace("m", {"extra": "x" * MAX_HEADER_BYTES})


# ---- what an object says of its serde


@pytest.fixture
def opened(monkeypatch):
    """Files that are opened."""
    found = []
    original = builtins.open

    def recorded(path, *args, **more):
        found.append(str(path))
        return original(path, *args, **more)

    monkeypatch.setattr(builtins, "open", recorded)
    monkeypatch.setattr("kvlab.serde.cachegen.load_tables", lambda path, _level: found.append(str(path)))
    monkeypatch.setattr("kvlab.serde.cachegen._is_file", lambda path: found.append(path))
    return found


HOSTILE_SERDES = [
    "cachegen:tables=/etc/passwd",
    "cachegen:tables=" + "a" * 5000,
    "cachegen:tables=a\0b",
    "cachegen:tables=/etc/passwd,level=nan",
    "int4:group=" + "9" * 5000,
    "int4:group=²",
    "int4:group=1",
    "lossless:element=x",
    "cachegen",
    "zip",
    "naive\nforged log line",
    "",
    "x" * 65,
]


@pytest.mark.parametrize("name", HOSTILE_SERDES)
def test_an_object_names_a_kind_and_nothing_else(engine, opened, name):
    engine.save(IDS, kv_of(64))
    key = engine.lookup(IDS).keys[0]
    value = bytes(engine.store.get(key))
    header = header_of(value)
    header["__metadata__"]["serde"] = name
    engine.store.put(key, forged(header, data_of(value)))
    assert engine.load(IDS) == (0, None)
    assert reason(engine) in ("serde", "corrupt")
    assert opened == []


def test_tables_are_those_the_reader_was_given(store):
    writer = engine_on(store)
    writer.serde = serde_of("cachegen")
    kv = torch.randn(3, 32, 2, 2, 16)
    place = {"axes": AXES, "first_token": 0, "end_token": 32}
    assert writer.save_object("k", kv, AXES, first_token=0, end_token=32)
    assert engine_on(store).load_object("k", **place) is None, "no tables"
    writer._serdes = {"cachegen": writer.serde}
    assert writer.save_object("k", kv, AXES, first_token=0, end_token=32)
    assert writer.load_object("k", **place) is not None


def test_what_a_serde_of_another_package_raises_is_a_miss(store, monkeypatch, caplog):
    class Broken(type(get_serde("naive"))):
        name = "broken"

        def decode(self, encoded, out=None):
            raise ZeroDivisionError("planted")

    monkeypatch.setitem(serdes.SERDES, "broken", f"{__name__}:unused")
    monkeypatch.setattr(serdes, "get_serde", lambda _spec: Broken())
    assert serde_to_read("broken").name == "broken"
    engine = engine_on(store)
    engine.serde = Broken()
    engine.save(IDS, kv_of(64))
    assert engine.load(IDS) == (0, None)
    assert reason(engine) == "error"
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("shape", [None, (2, 32, 3, 2, 4)])
def test_a_serde_of_another_package_that_leaves_out_alone(store, monkeypatch, shape):
    """What lay in `out` before, another's KV perhaps, is not taken for the object."""

    class Own(type(get_serde("naive"))):
        name = "own"

        def decode(self, encoded, out=None):
            kv = super().decode(encoded, None).clone()
            return kv if shape is None else kv[..., :4]

    monkeypatch.setitem(serdes.SERDES, "own", f"{__name__}:unused")
    monkeypatch.setattr(serdes, "get_serde", lambda _spec: Own())
    engine = engine_on(store)
    engine.serde = Own()
    kv, out = kv_of(32), torch.full((2, 32, 3, 2, 8), 7.0)
    assert engine.save_object("k", kv, AXES, first_token=0, end_token=32)
    loaded = engine.load_object("k", out, axes=AXES, first_token=0, end_token=32)
    if shape is None:
        assert loaded is out
        assert torch.equal(out, kv)
    else:
        assert loaded is None


# ---- limits before work


@pytest.mark.parametrize("serde", ["naive", "lossless"])
@pytest.mark.parametrize("has_out", [True, False])
def test_more_bytes_than_any_such_object_are_not_read(tmp_path, serde, has_out, monkeypatch):
    with open_store(f"file://{tmp_path}?size=8MiB") as store:
        engine = engine_on(store, serde=serde, geometry=GEOMETRY)
        kv = kv_of(32)
        store.put("k", bytes(MOST_GROWTH * kv.nbytes + (64 << 10) + 1))
        monkeypatch.setattr(store, "get", lambda _key: pytest.fail("read whole"))
        assert engine.load_object("k", kv if has_out else None, axes=AXES, first_token=0, end_token=32) is None
        assert reason(engine) == "too_large"


def test_kv_that_decodes_to_more_than_was_asked_for_is_refused_undecoded():
    huge = json.dumps([1, 256, 1 << 20, 2, 8])
    parts, metadata = to_parts(get_serde("naive").encode(kv_of(32), AXES))
    for expected in (Expected(), Expected(max_bytes=256 * MAX_TOKEN_BYTES), Expected(max_bytes=1000)):
        with pytest.raises(FormatError) as caught:
            from_parts(parts, {**metadata, "shape": huge}, expected)
        assert caught.value.reason == "too_large"


class Allocations:
    """In the place of torch.empty: only tensors without memory."""

    def __init__(self):
        self.original = torch.empty

    def __call__(self, shape, **more):
        assert more.get("device") == "meta", "allocated"
        return self.original(shape, **more)


@pytest.mark.parametrize("spec", SPECS)
def test_no_serde_allocates_for_a_shape_its_parts_do_not_have(spec, monkeypatch):
    """A shape of a terabyte, of which no part has a byte: refused by sizes alone."""
    serde = serde_of(spec)
    encoded = serde.encode(torch.randn(3, 10, 2, 2, 16), AXES)
    monkeypatch.setattr("kvlab.serde.base.torch.empty", Allocations())
    shape = (3, 10 << 30, 2, 2, 16)
    params = {**encoded.params, **({"rows": shape[1]} if "rows" in encoded.params else {})}
    with pytest.raises(FormatError):
        serde.decode(Encoded(encoded.serde, shape, encoded.dtype, encoded.axes, encoded.parts, params))


# ---- two reads


class Mixed(WrapperStore):
    """A tier whose first answer for a key is another key's."""

    def __init__(self, inner, wrong):
        super().__init__(inner)
        self.wrong = dict(wrong)

    def get(self, key):
        return super().get(self.wrong.pop(key, key))


def test_a_reply_of_another_object_does_not_cost_the_good_one(store):
    engine, value = engine_on(store), kv_of(64)
    engine.save(IDS, value)
    first, second = engine.lookup(IDS).keys
    engine.store = Mixed(store, {second: first})
    count, back = engine.load(IDS)
    assert count == 64
    assert torch.equal(back, value)
    assert not engine.counters.misses


def test_the_header_of_every_kind_leaves_room_for_the_namespace():
    """The limit on headers, the limit on namespaces, and what kinds write fit together."""
    engine = CacheEngine(
        open_store("memory://?size=64MiB"), namespace=Namespace("m", {"extra": "x" * 11_800}), chunker=CHUNKER
    )
    for spec in SPECS:
        engine.serde = serde_of(spec)
        assert engine.save_object("k" * 300, torch.randn(3, 11, 2, 2, 16), AXES, first_token=0, end_token=11), spec


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: get_serde(None), "serde must be a name like 'naive' or 'int4:group=64', got NoneType"),
        (lambda: CacheEngine("memory://?size=1MiB", namespace="m", serde=object()), "must be a name .* got object"),
        (lambda: CacheEngine(["memory://?size=1MiB"], namespace="m"), r"got list; several are one by .*open_stores"),
        (lambda: CacheEngine(None, namespace="m"), "store must be a URL like .* got NoneType"),
        (
            lambda: CacheEngine("memory://?size=1MiB", namespace="m").save([1], kv_of(1).numpy()),
            "kv must be a torch.Tensor, got ndarray; torch.from_numpy",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(use, words):
    with pytest.raises(ConfigError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_the_callers_mistake_is_no_outage_of_a_tier():
    with open_stores(["memory://?size=1MiB", "memory://?size=2MiB"]) as stack:
        for wrong in (5, None, "text"):
            with pytest.raises(TypeError):
                stack.put("k", wrong)
        assert stack.put("k", b"value")
        assert all(tier.store.contains("k") for tier in stack.tiers)
