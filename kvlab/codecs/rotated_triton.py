"""`rotated4` on a GPU: pages to codes and scales in one pass, and back.

The twin is `kvlab.serde.rotated`, and the bytes agree: sums are taken in its order, and every operation rounds as it
does there (see `scaled_triton`). A program has a few tokens of one head, all of its channels.
"""

from typing import Any

import triton
import triton.language as tl

from kvlab.codecs.scaled_triton import (
    LIMIT,
    NON_FINITE,
    _bf16,
    _columns,
    _is_odd,
    _object,
    _page,
    _read,
    _rounded_to_bf16,
    _rows,
    _write,
)
from kvlab.serde.rotated import BOUNDS, HALF_LEVELS
from kvlab.serde.rotated import LARGE as _LARGE
from kvlab.serde.rotated import SMALL as _SMALL

LARGE, SMALL = tl.constexpr(_LARGE), tl.constexpr(_SMALL)
B = tuple(BOUNDS.tolist()[8:])  # those above zero; the others are their negatives, and zero
B0, B1, B2, B3, B4, B5, B6 = (tl.constexpr(bound) for bound in B)
L0, L1, L2, L3, L4, L5, L6, L7 = (tl.constexpr(level) for level in HALF_LEVELS)
jit: Any = triton.jit


@jit
def _sign(channel):
    """1.0 or -1.0: bit 13 of a product of which the lower 14 bits decide."""
    return 1.0 - 2.0 * (((channel * 0x39B1) >> 13) & 1).to(tl.float32)


@jit
def _transformed(values, ROOT: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Hadamard's transform of each BLOCK of channels, neighbours first."""
    for stage in tl.static_range(0, 10):
        if (1 << stage) < BLOCK:
            pairs = tl.reshape(values, [TOKENS, CHANNELS // (2 << stage), 2, 1 << stage])
            left, right = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            values = tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2))
            values = tl.reshape(values, [TOKENS, CHANNELS])
    return values * ROOT


@jit
def _summed(values, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums over channels: the upper half is added to the lower one until one number is left."""
    for stage in tl.static_range(0, 10):
        if (CHANNELS >> stage) > 1:
            halves = tl.reshape(values, [TOKENS, 2, CHANNELS >> (stage + 1)])
            lower, upper = tl.split(tl.permute(halves, (0, 2, 1)))
            values = lower + upper
    return tl.reshape(values, [TOKENS])


@jit
def _level(place):
    """The `place`-th level above zero."""
    low = tl.where(place < 2, tl.where(place < 1, L0, L1), tl.where(place < 3, L2, L3))
    high = tl.where(place < 6, tl.where(place < 5, L4, L5), tl.where(place < 7, L6, L7))
    return tl.where(place < 4, low, high)


@jit
def _place(size):
    """How many bounds above zero a number is beyond, int32."""
    found = (size > B0).to(tl.int32) + (size > B1).to(tl.int32) + (size > B2).to(tl.int32)
    found += (size > B3).to(tl.int32) + (size > B4).to(tl.int32) + (size > B5).to(tl.int32)
    return found + (size > B6).to(tl.int32)


@jit
def _not_below(size):
    """The same for the negatives of numbers, which are on a bound's lower side if they lie on it."""
    found = (size >= B0).to(tl.int32) + (size >= B1).to(tl.int32) + (size >= B2).to(tl.int32)
    found += (size >= B3).to(tl.int32) + (size >= B4).to(tl.int32) + (size >= B5).to(tl.int32)
    return found + (size >= B6).to(tl.int32)


@jit(
    do_not_specialize=["num_tokens", "object_blocks", "plane", "num_planes"],
    do_not_specialize_on_alignment=["ids", "flags"],
)
def _encode(
    page_pointers, ids, tokens, heads, channels, payload, scales, flags,
    num_layers, object_blocks, object_bytes, block_stride, block_tokens,
    num_tokens, num_heads, plane, num_planes, head_dim, run,
    ROOT: tl.constexpr, BLOCK: tl.constexpr, FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr,
    ALIGN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each vector its root mean square and `run` bytes of codes; (tokens, heads, planes) of them lie in a layer."""
    tiles = tl.cdiv(num_tokens, TOKENS)
    tile = tl.program_id(0) % tiles
    layer, ids, payload, scales, _ = _object(
        tl.program_id(0) // tiles, num_layers, ids, payload, scales, scales, object_blocks, object_bytes
    )
    flags += (tl.program_id(0) // tiles // num_layers) * 2
    head = tl.program_id(1)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    rows = _rows(ids, tokens, token, live, block_tokens, block_stride, ALIGN)
    place = tl.arange(0, CHANNELS)
    inside = live[:, None] & (place < head_dim)[None, :]
    values = _read(page, rows, _columns(channels, place, place < head_dim, STRIDE), inside, FLOAT)
    odd = tl.max(tl.max(_is_odd(values, inside), axis=1), axis=0)
    top = tl.max(tl.abs(values), axis=1)
    divisor = tl.where(top > 0, top, 1.0)
    unit = tl.div_rn(values, divisor[:, None] + values * 0)
    mean = tl.div_rn(_summed(unit * unit, TOKENS, CHANNELS), top * 0 + head_dim.to(tl.float32))
    scale = _rounded_to_bf16(tl.minimum(tl.sqrt_rn(mean) * top, LIMIT))
    small = tl.where(top > LARGE, SMALL, 1.0)
    wide = _bf16(scale) * small
    inverse = tl.div_rn(wide * 0 + 1.0, tl.where(wide > 0, wide, 1.0))
    is_finite = (wide > 0) & ((inverse.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000)
    inverse = tl.where(is_finite, inverse, 0.0)
    turned = _transformed(values * small[:, None] * _sign(place)[None, :], ROOT, BLOCK, TOKENS, CHANNELS)
    turned = turned * inverse[:, None]
    size = tl.abs(turned)
    code = tl.where(turned > 0, 8 + _place(size), 7 - _not_below(size))
    row = ((layer.to(tl.int64) * num_tokens + token) * num_heads + head) * num_planes + plane
    above = run + place
    if CHANNELS == 1:
        upper = code * 0
    else:
        other = tl.zeros([TOKENS, CHANNELS], tl.int32) + tl.minimum(above, CHANNELS - 1)[None, :]
        upper = tl.gather(code, other, axis=1)
    packed = code | (tl.where((above < head_dim)[None, :], upper, 0) << 4)
    tl.store(
        payload + row[:, None] * run + place[None, :], packed.to(tl.int8), mask=live[:, None] & (place < run)[None, :]
    )
    tl.store(scales + row, scale.to(tl.int16), mask=live)
    tl.store(flags, NON_FINITE, mask=odd > 0)


@jit(
    do_not_specialize=["num_tokens", "object_blocks", "plane", "num_planes"],
    do_not_specialize_on_alignment=["ids"],
)
def _decode(
    page_pointers, ids, tokens, heads, channels, payload, scales,
    num_layers, object_blocks, object_bytes, block_stride, block_tokens,
    num_tokens, num_heads, plane, num_planes, head_dim, run,
    ROOT: tl.constexpr, BLOCK: tl.constexpr, FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr,
    ALIGN: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """What `_encode` made, into pages."""
    tiles = tl.cdiv(num_tokens, TOKENS)
    tile = tl.program_id(0) % tiles
    layer, ids, payload, scales, _ = _object(
        tl.program_id(0) // tiles, num_layers, ids, payload, scales, scales, object_blocks, object_bytes
    )
    head = tl.program_id(1)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    place = tl.arange(0, CHANNELS)
    inside = live[:, None] & (place < head_dim)[None, :]
    row = ((layer.to(tl.int64) * num_tokens + token) * num_heads + head) * num_planes + plane
    spot = tl.where(place < run, place, place - run)
    packed = tl.load(payload + row[:, None] * run + spot[None, :], mask=inside, other=0).to(tl.int32)
    code = tl.where((place < run)[None, :], packed, packed >> 4) & 15
    value = tl.where(code < 8, -_level(7 - code), _level(code - 8))
    turned = _transformed(tl.where(inside, value, 0.0), ROOT, BLOCK, TOKENS, CHANNELS) * _sign(place)[None, :]
    scale = _bf16(tl.load(scales + row, mask=live, other=0))
    value = tl.minimum(tl.maximum(turned * scale[:, None], -LARGEST), LARGEST)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    rows = _rows(ids, tokens, token, live, block_tokens, block_stride, ALIGN)
    _write(page, rows, _columns(channels, place, place < head_dim, STRIDE), inside, value, FLOAT)
