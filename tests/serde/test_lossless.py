"""lossless: what it finds in opaque pages, and what its size is."""

from dataclasses import replace

import pytest
import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde import get_serde, lossless
from kvlab.serde.bitpack import pack, unpack
from kvlab.testing.serde import PAGES, kv_like, raw

KV = kv_like((4, 128, 2, 2, 64))
LAYOUTS = {  # (layers, blocks, tokens, heads, kv, dim) -> order inside a page
    "token-major": (1, 0, 2, 3, 4, 5),
    "head-major": (1, 0, 3, 2, 4, 5),
    "K before V": (1, 0, 4, 2, 3, 5),
    "transposed": (1, 0, 4, 3, 5, 2),
}


def ratio(kv: torch.Tensor, axes: tuple[str, ...], spec: str = "lossless") -> float:
    encoded = get_serde(spec).encode(kv, axes)
    assert raw(get_serde("lossless").decode(encoded)).equal(raw(kv))
    return 8 * kv.numel() * kv.element_size() / sum(encoded.bits().values())


def pages(kv: torch.Tensor, order: tuple[int, ...], block: int = 32) -> torch.Tensor:
    cut = kv.unflatten(1, (-1, block)).permute(order).contiguous()
    return cut.view(torch.uint8).reshape(kv.shape[1] // block, kv.shape[0], -1)


@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
def test_opaque_pages_pack_as_well_as_typed_kv(order: tuple[int, ...]) -> None:
    assert ratio(pages(KV, order), PAGES) > 0.98 * ratio(KV, AXES) > 1.3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_the_element_is_found_and_written_down(dtype: str) -> None:
    kv = (
        KV.float()
        .mul(1 + torch.rand(KV.shape, generator=torch.Generator().manual_seed(1)) / 64)
        .to(getattr(torch, dtype))
    )
    encoded = get_serde("lossless").encode(pages(kv, LAYOUTS["token-major"]), PAGES)
    assert encoded.params["element"] == dtype
    given = get_serde(f"lossless:element={dtype}").encode(pages(kv, LAYOUTS["token-major"]), PAGES)
    assert given.params["element"] == dtype


def test_noise_is_kept_as_it_is() -> None:
    noise = torch.randint(0, 256, (2, 4, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoded = get_serde("lossless").encode(noise, PAGES)
    assert sum(encoded.bits().values()) == 8 * noise.numel()
    assert encoded.params == {"coding": "raw"}


def test_the_encoded_chunk_shares_no_memory_with_its_source() -> None:
    noise = torch.randint(0, 256, (2, 4, 4096), dtype=torch.uint8)
    encoded, before = get_serde("lossless").encode(noise, PAGES), noise.clone()
    noise.zero_()
    assert get_serde("lossless").decode(encoded).equal(before)


def test_escapes_must_be_as_many_as_the_codes_name() -> None:
    encoded = get_serde("lossless").encode(KV, AXES)
    escapes = encoded.parts["payload.escapes"]
    for wrong in (escapes[:-1], torch.cat([escapes, escapes[:1]])):
        with pytest.raises(FormatError, match="escapes"):
            get_serde("lossless").decode(
                type(encoded)(
                    encoded.serde,
                    encoded.shape,
                    encoded.dtype,
                    encoded.axes,
                    {**encoded.parts, "payload.escapes": wrong},
                    encoded.params,
                )
            )


def test_unknown_elements_are_refused() -> None:
    with pytest.raises(ConfigError, match="element must be auto"):
        get_serde("lossless:element=int8")


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4096, 4099])
def test_bitpack_round_trip_and_size(width: int, length: int) -> None:
    codes = torch.randint(0, 2**width, (3, length), dtype=torch.uint8).numpy()
    packed = pack(codes, width)
    assert (unpack(packed, length, width) == codes).all()
    assert packed.nbytes <= 3 * (length * width / 8 + width + 1)


def wild(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """KV in which two channels hold numbers of all sizes: infinities, NaN, zeros of both signs, subnormal numbers."""
    source = torch.Generator().manual_seed(seed)
    words = kv_like(shape).view(torch.int16).clone()
    words[..., 3:5] = torch.randint(-(2**15), 2**15, (*shape[:-1], 2), generator=source, dtype=torch.int16)
    return words.view(torch.bfloat16)


@pytest.mark.parametrize("shape", [(2, 128, 1, 2, 16), (3, 133, 1, 1, 40), (1, 300, 3, 2, 64)])
def test_compiled_loops_write_and_read_the_bytes_of_the_reference(shape: tuple[int, ...], monkeypatch) -> None:
    kv = wild(shape, shape[1])
    fast = get_serde("lossless").encode(kv, AXES)
    read = get_serde("lossless").decode(fast)
    assert lossless._fast() is not None
    with monkeypatch.context() as patch:
        patch.setattr(lossless, "_fast", lambda: None)
        slow = get_serde("lossless").encode(kv, AXES)
        assert raw(get_serde("lossless").decode(fast)).equal(raw(kv))
    assert raw(read).equal(raw(kv))
    assert fast.params == slow.params
    assert fast.params["period"] >= lossless.LEAST_PERIOD
    assert all(fast.parts[name].equal(part) for name, part in slow.parts.items())


@pytest.mark.parametrize("change", [-40, -1, 1])
def test_escapes_that_are_too_few_or_too_many_are_told(change: int) -> None:
    encoded = get_serde("lossless").encode(wild((2, 128, 1, 2, 16), 0), AXES)
    escapes = encoded.parts["payload.escapes"]
    other = escapes[:change] if change < 0 else torch.cat([escapes, escapes[:change]])
    with pytest.raises(FormatError, match="escapes, its codes name others"):
        get_serde("lossless").decode(replace(encoded, parts={**encoded.parts, "payload.escapes": other}))
