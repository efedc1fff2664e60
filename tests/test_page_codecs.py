"""Serdes over typed pages: the twins."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from kvlab.codecs import PageCodec
from kvlab.container import unpack
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.hashing import Namespace
from kvlab.page_objects import PageObjects
from kvlab.paged import Opaque
from kvlab.paged.known import KNOWN, known_maps
from kvlab.serde import get_serde
from kvlab.serde.cachegen import CacheGenSerde
from kvlab.serde.tables import profile, save_tables
from kvlab.serde.wire import from_parts, to_parts
from kvlab.testing.serde import kv_like, mutants, raw
from tests.serde.test_golden import GOLDEN, serde_of

KINDS = ["naive", "lossless", "fp8", "int8", "int8:k=channel,v=token", "int4", "rotated4"]
LAYERS = 2


def page_map_of(name="NHC", *, heads=2, dim=64, tokens=16, element=torch.bfloat16, latent=False, slack=0):
    size = tokens * heads * (1 if latent else 2) * dim * element.itemsize + slack
    found = known_maps(
        block_tokens=tokens, kv_heads=heads, head_dim=dim, element=element, page_bytes=size, latent=latent
    )
    return {one.name: one for one in found}[name]


def random_pages(page_map, num_blocks, seed=0):
    shape = (num_blocks, LAYERS, page_map.page_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def filled(page_map, num_tokens, seed=0):
    """Pages that hold `num_tokens` tokens of typed KV, and that KV."""
    pages = random_pages(page_map, -(-num_tokens // page_map.block_tokens) or 1)
    kv = kv_like(page_map.shape(LAYERS, num_tokens), str(page_map.element).removeprefix("torch."), seed)
    page_map.write(kv, pages)
    return pages, kv


def cachegen(page_map):
    texts = [kv_like(page_map.shape(LAYERS, 64), "float32", seed) for seed in range(2)]
    return CacheGenSerde(profile(texts, AXES, level=0.25))


@pytest.mark.parametrize("spec", [*KINDS, "cachegen"])
@pytest.mark.parametrize("name", list(KNOWN))
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 31, 77])
def test_pages_hold_what_the_serde_makes_of_their_kv(spec, name, num_tokens):
    page_map = page_map_of(name)
    pages, kv = filled(page_map, num_tokens)
    serde = cachegen(page_map) if spec == "cachegen" else get_serde(spec)
    codec = PageCodec(serde, page_map)
    encoded, typed = codec.encode(pages, num_tokens), serde.encode(kv, AXES)
    assert encoded.params == typed.params
    assert encoded.parts.keys() == typed.parts.keys()
    assert all(raw(encoded.parts[part]).equal(raw(typed.parts[part])) for part in typed.parts)
    target = random_pages(page_map, len(pages), seed=1)
    want = target.clone()
    page_map.write(serde.decode(typed), want)
    codec.decode(encoded, target)
    assert target.equal(want)  # the tokens' elements, and every other byte as it was


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 80), (3, 128), (16, 96), (8, 256)])
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_and_widths_of_all_sizes(spec, heads, dim, element):
    page_map = page_map_of("HNC", heads=heads, dim=dim, element=element)
    pages, kv = filled(page_map, 21)
    codec = PageCodec(get_serde(spec), page_map)
    back = torch.zeros_like(pages)
    codec.decode(codec.encode(pages, 21), back)
    found = page_map.read(back, 21)
    if codec.serde.lossless:
        assert raw(found).equal(raw(kv))
    else:
        assert float((found.float() - kv.float()).norm() / kv.float().norm()) < 0.16


@pytest.mark.parametrize("spec", [*KINDS, "int4:k=token", "int8:k=channel"])
@pytest.mark.parametrize("num_tokens", [1, 17, 64])
def test_latents_are_coded_as_one_plane(spec, num_tokens):
    page_map = page_map_of("latents", heads=1, dim=576, latent=True)
    pages, kv = filled(page_map, num_tokens)
    codec = PageCodec(get_serde(spec), page_map)
    encoded = codec.encode(pages, num_tokens)
    assert encoded.shape == (LAYERS, num_tokens, 1, 1, 576)
    assert not any(name.endswith(".v") for name in encoded.parts)
    parts, metadata = to_parts(encoded)
    back = random_pages(page_map, len(pages), seed=1)
    codec.decode(from_parts(parts, metadata), back)
    found = page_map.read(back, num_tokens)
    assert float((found.float() - kv.float()).norm() / kv.float().norm()) < (1e-9 if codec.serde.lossless else 0.16)


@pytest.mark.parametrize("element", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_pages_are_kept_bit_by_bit_or_refused(element):
    page_map = page_map_of(element=element)
    pages, kv = filled(page_map, 20)
    codec = PageCodec(get_serde("lossless"), page_map)
    back = torch.zeros_like(pages)
    codec.decode(codec.encode(pages, 20), back)
    assert raw(page_map.read(back, 20)).equal(raw(kv))
    with pytest.raises(ConfigError, match=f"pages hold {str(element)[6:]} already"):
        PageCodec(get_serde("int4"), page_map)


def test_kinds_that_cannot_code_such_pages_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"'int4:k=channel,v=token,group=64' must tell K from V.*opaque: its swizzle"):
        PageCodec(get_serde("int4"), Opaque("its swizzle"))
    latents = page_map_of("latents", heads=1, dim=576, latent=True)
    for serde in (get_serde("cachegen-lmcache"), cachegen(page_map_of())):
        with pytest.raises(ConfigError, match="latents"):
            PageCodec(serde, latents)
        with pytest.raises(ConfigError, match="latents"):
            serde.encode(torch.zeros(latents.shape(LAYERS, 3)), AXES)


def test_opaque_pages_are_coded_as_bytes():
    pages = random_pages(page_map_of(), 3)
    codec = PageCodec(get_serde("lossless"), Opaque("unknown"))
    encoded = codec.encode(pages, 17)
    back = torch.zeros_like(pages)
    codec.decode(encoded, back)
    assert back.equal(pages)
    with pytest.raises(FormatError, match="the object holds uint8"):
        codec.decode(encoded, back[:2])


@pytest.mark.parametrize("change", [
    {"dtype": "float16"}, {"axes": AXES[::-1]}, {"shape": (LAYERS, 33, 2, 2, 64)}, {"shape": (LAYERS, 16, 2, 2, 64)},
    {"shape": (1, 20, 2, 2, 64)}, {"shape": (LAYERS, 20, 4, 2, 32)}, {"shape": (LAYERS, 20)},
])  # fmt: skip
def test_an_object_of_other_pages_is_refused_and_nothing_is_written(change):
    page_map = page_map_of()
    pages, _ = filled(page_map, 20)
    codec = PageCodec(get_serde("int8"), page_map)
    encoded, before = codec.encode(pages, 20), pages.clone()
    with pytest.raises(FormatError):
        codec.decode(replace(encoded, **change), pages)
    assert pages.equal(before)


@pytest.mark.parametrize("spec", ["lossless", "int8", "int4", "fp8", "rotated4"])
def test_hostile_bytes_are_a_format_error_or_stay_within_their_tokens(spec):
    page_map = page_map_of("HNC", heads=1, dim=16, slack=64)
    pages, _ = filled(page_map, 20)
    codec = PageCodec(get_serde(spec), page_map)
    encoded, refused = codec.encode(pages, 20), 0
    free = torch.ones(2, LAYERS, page_map.page_bytes, dtype=torch.bool)
    for block, tokens in ((0, 16), (1, 4)):
        for byte in range(2):
            free[block][:, page_map.offsets[:tokens].flatten() + byte] = False
    for broken in mutants(encoded, 1500):
        before = pages.clone()
        try:
            codec.decode(broken, pages)
        except FormatError:
            refused += 1
            assert pages.equal(before)
        assert pages[free].equal(before[free])
    assert refused > 100


@pytest.mark.parametrize("kind", ["fp8", "int4", "int8", "lossless", "naive", "cachegen"])
def test_golden_objects_come_out_of_pages(kind):
    """The format on a medium is the serde's, whichever way the pages lie."""
    opened = unpack((GOLDEN / kind / "v2.safetensors").read_bytes(), "golden")
    kv = load_file(GOLDEN / kind / "v2.expected.safetensors")["kv"]
    page_map = page_map_of("CPU amx", heads=kv.shape[2], dim=kv.shape[4])
    pages = torch.zeros(2, kv.shape[0], page_map.page_bytes, dtype=torch.uint8)
    page_map.write(kv, pages)
    parts, metadata = to_parts(PageCodec(serde_of(kind), page_map).encode(pages, kv.shape[1]))
    assert {name: bytes(part.data) for name, part in parts.items()} == {
        name: bytes(part.data) for name, part in opened.parts.items()
    }
    assert metadata == {key: opened.metadata[key] for key in metadata}


@pytest.mark.parametrize("spec", ["cachegen", "cachegen-lmcache"])
def test_chunks_go_to_a_store_and_come_back_as_the_twin_has_them(spec, tmp_path):
    """As a tier worker codes them, of pages that a message tells of."""
    if spec == "cachegen":
        text = kv_like((LAYERS, 64, 2, 2, 64), "float32")
        save_tables(tmp_path / "tables", [profile([text], AXES, 0.25)])
        spec = f"cachegen:tables={tmp_path / 'tables'},level=0.25"
    page_map = page_map_of("CPU amx", slack=32)
    objects = PageObjects("memory://?size=16MiB", namespace=Namespace("m"), serde=spec)
    objects.know_pages(json.loads(json.dumps(page_map.as_json())), LAYERS)
    twin = PageCodec(get_serde(spec), page_map)
    for num_tokens in (5, 40, 64):
        pages, _ = filled(page_map, num_tokens)
        key = objects.namespace.key(bytes([num_tokens]) * 16)
        assert objects.save(key, pages.numpy(), first_token=0, end_token=num_tokens)
        found, want = torch.full_like(pages, 0x5A), torch.zeros_like(pages)
        assert objects.load(key, found.numpy(), first_token=0, end_token=num_tokens)
        twin.decode(twin.encode(pages, num_tokens), want)
        assert found.equal(want), "and what is none of the tokens' is zero"
        assert not objects.load(key, found.numpy(), first_token=0, end_token=num_tokens - 1)
    nan = pages.clone()
    page_map.write(torch.full(page_map.shape(LAYERS, 64), float("nan"), dtype=torch.bfloat16), nan)
    assert not objects.save(objects.namespace.key(bytes(16)), nan.numpy(), first_token=0, end_token=64)
    with pytest.raises(ConfigError, match="must tell K from V, and"):
        PageCodec(get_serde(spec), Opaque("its swizzle"))
