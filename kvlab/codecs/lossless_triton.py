"""`lossless` on a GPU: pages of bf16 to windows of exponents in one pass, and back; the twin is
`kvlab.serde.lossless`, and the bytes agree.

A slab is a layer's tokens; its elements are numbered as typed KV lies in memory (tokens, kv_heads, kv, head_dim), and
read from the pages through tables. Encoding takes three launches: each channel's window, the codes with the number of
escapes of each tile, and, when a prefix sum has said where each tile's escapes begin, the escapes. Decoding takes two:
the count, and the words. bf16 only: it is the format that KV is served in, and the one whose rest is exactly one byte.
"""

from typing import Any

import triton
import triton.language as tl

RUN = 512  # elements of one of a slab's eight runs that a program handles
TOKENS, CHANNELS = 32, 64  # of a tile of `_windows`
OVERFULL = tl.constexpr(1)  # what `flags` says: escapes and their part do not fit each other
jit: Any = triton.jit


@jit
def _codes(first, k, at, run_bytes):
    """Codes (8, RUN) of byte positions `at`: code k is three bits that begin at bit 3k of the position's 24."""
    a = tl.load(first + at, mask=at < run_bytes, other=0).to(tl.int32)
    b = tl.load(first + run_bytes + at, mask=at < run_bytes, other=0).to(tl.int32)
    c = tl.load(first + 2 * run_bytes + at, mask=at < run_bytes, other=0).to(tl.int32)
    return ((a | (b << 8) | (c << 16))[None, :] >> (3 * k)) & 7


@jit
def _object(slab_index, num_layers, ids, object_blocks, object_bytes):
    """A slab's layer, its object's block ids, and where it begins: objects of one size lie in a row."""
    at = slab_index // num_layers
    return slab_index % num_layers, ids + at * object_blocks, at.to(tl.int64) * object_bytes


@jit(do_not_specialize=["slab", "run_bytes", "tiles"])
def _count(codes, counts, num_layers, object_bytes, slab, run_bytes, tiles, RUN: tl.constexpr):
    """Escapes of one tile: 8 runs of RUN codes of a slab."""
    slab_index, tile = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, 8)[:, None]
    at = tile * RUN + tl.arange(0, RUN)
    inside = (at < run_bytes)[None, :] & (k * run_bytes + at[None, :] < slab)
    there = (slab_index // num_layers).to(tl.int64) * object_bytes
    first = codes + there + (slab_index % num_layers).to(tl.int64) * 3 * run_bytes
    code = _codes(first, k, at, run_bytes)
    escaped = tl.sum(tl.where(inside & (code == 7), 1, 0), axis=1)
    tl.store(counts + (slab_index * 8 + tl.arange(0, 8)) * tiles + tile, escaped)


@jit
def _where(
    ids, tokens, channels, token, channel, inside, block_stride,
    BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Places of elements, from a layer's first page: `channel` counts (kv_heads, kv, head_dim)."""
    plane = (channel // HEAD_DIM) % PLANES
    block = tl.load(ids + token // BLOCK_TOKENS, mask=inside, other=0).to(tl.int64)
    row = tl.load(tokens + plane * BLOCK_TOKENS + token % BLOCK_TOKENS, mask=inside, other=0)
    return block * block_stride + row + tl.load(channels + channel, mask=inside, other=0)


@jit(do_not_specialize=["num_tokens", "object_blocks"])
def _windows(
    page_pointers, ids, tokens, channels, base, num_layers, object_blocks, object_bytes, block_stride, num_tokens,
    PERIOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Window bases (layers, period): each ends at its channel's largest exponent, NaN and infinity left out."""
    layer, ids, there = _object(tl.program_id(0), num_layers, ids, object_blocks, object_bytes)
    page = tl.load(page_pointers + layer).to(tl.pointer_type(tl.int16))
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    top = tl.zeros([CHANNELS], tl.int32)
    for first in range(0, num_tokens, TOKENS):
        token = (first + tl.arange(0, TOKENS))[:, None]
        inside = (token < num_tokens) & (channel < PERIOD)[None, :]
        at = _where(
            ids, tokens, channels, token, channel[None, :], inside, block_stride, BLOCK_TOKENS, HEAD_DIM, PLANES
        )
        exponent = (tl.load(page + at, mask=inside, other=0).to(tl.int32) >> 7) & 0xFF
        top = tl.maximum(top, tl.max(tl.where(exponent == 255, 0, exponent), axis=0))
    lowest = tl.maximum(top, 6) - 6
    tl.store(base + there + layer * PERIOD + channel, lowest.to(tl.uint8), mask=channel < PERIOD)


@jit
def _word(
    page_pointers, ids, tokens, channels, layer, element, inside, block_stride,
    PERIOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Words of elements of a slab, as int32."""
    page = tl.load(page_pointers + layer).to(tl.pointer_type(tl.int16))
    at = _where(
        ids, tokens, channels, element // PERIOD, element % PERIOD, inside, block_stride, BLOCK_TOKENS, HEAD_DIM, PLANES
    )
    return tl.load(page + at, mask=inside, other=0).to(tl.int32) & 0xFFFF


@jit
def _below(word, base, layer, element, inside, PERIOD: tl.constexpr):
    """Exponents, and their places in their windows; 7 and more are escapes."""
    exponent = (word >> 7) & 0xFF
    lowest = tl.load(base + layer * PERIOD + element % PERIOD, mask=inside, other=0).to(tl.int32)
    return exponent, (exponent - lowest) & 0xFF


@jit(do_not_specialize=["slab", "run_bytes", "tiles", "object_blocks"])
def _encode(
    page_pointers, ids, tokens, channels, base, codes, rest, counts,
    num_layers, object_blocks, object_bytes, block_stride, slab, run_bytes, tiles,
    PERIOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Codes and rest of one tile: 8 runs of RUN elements of a slab; and how many escapes each has."""
    slab_index, tile = tl.program_id(0), tl.program_id(1)
    layer, ids, there = _object(slab_index, num_layers, ids, object_blocks, object_bytes)
    k = tl.arange(0, 8)[:, None]
    at = tile * RUN + tl.arange(0, RUN)
    element = k * run_bytes + at[None, :]
    inside = (at < run_bytes)[None, :] & (element < slab)
    word = _word(
        page_pointers, ids, tokens, channels, layer, element, inside, block_stride,
        PERIOD, BLOCK_TOKENS, HEAD_DIM, PLANES,
    )  # fmt: skip
    _, below = _below(word, base + there, layer, element, inside, PERIOD)
    code = tl.where(inside, tl.minimum(below, 7), 0)
    packed = tl.sum(code << (3 * k), axis=0)
    first = codes + there + layer.to(tl.int64) * 3 * run_bytes + at
    tl.store(first, packed.to(tl.uint8), mask=at < run_bytes)
    tl.store(first + run_bytes, (packed >> 8).to(tl.uint8), mask=at < run_bytes)
    tl.store(first + 2 * run_bytes, (packed >> 16).to(tl.uint8), mask=at < run_bytes)
    kept = (word & 0x7F) | ((word >> 8) & 0x80)
    tl.store(rest + there + layer.to(tl.int64) * slab + element, kept.to(tl.uint8), mask=inside)
    escaped = tl.sum(tl.where(inside & (below >= 7), 1, 0), axis=1)
    tl.store(counts + (slab_index * 8 + tl.arange(0, 8)) * tiles + tile, escaped)


@jit(do_not_specialize=["slab", "run_bytes", "tiles", "room", "object_blocks"])
def _escapes(
    page_pointers, ids, tokens, channels, base, starts, escapes, flags,
    num_layers, object_blocks, object_bytes, block_stride, slab, run_bytes, tiles, room,
    PERIOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The escapes of one tile, in the order of their elements."""
    slab_index, tile = tl.program_id(0), tl.program_id(1)
    layer, ids, there = _object(slab_index, num_layers, ids, object_blocks, object_bytes)
    k = tl.arange(0, 8)[:, None]
    at = (tile * RUN + tl.arange(0, RUN))[None, :]
    element = k * run_bytes + at
    inside = (at < run_bytes) & (element < slab)
    word = _word(
        page_pointers, ids, tokens, channels, layer, element, inside, block_stride,
        PERIOD, BLOCK_TOKENS, HEAD_DIM, PLANES,
    )  # fmt: skip
    exponent, below = _below(word, base + there, layer, element, inside, PERIOD)
    escaped = inside & (below >= 7)
    order = tl.cumsum(tl.where(escaped, 1, 0), axis=1) - 1
    place = tl.load(starts + (slab_index * 8 + k) * tiles + tile) + order
    tl.store(escapes + there + place, exponent.to(tl.uint8), mask=escaped & (place < room))
    full = tl.max(tl.max(tl.where(escaped & (place >= room), 1, 0), axis=1), axis=0)
    tl.store(flags + 2 * (slab_index // num_layers), OVERFULL, mask=full > 0)


@jit(do_not_specialize=["slab", "run_bytes", "tiles", "object_blocks"])
def _scatter(
    page_pointers, ids, tokens, channels, base, codes, rest, escapes, starts, totals, num_escapes, flags,
    num_layers, object_blocks, object_bytes, block_stride, slab, run_bytes, tiles,
    PERIOD: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, PLANES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Words of one tile into pages; none at all where the codes name more or fewer escapes than there are."""
    slab_index, tile = tl.program_id(0), tl.program_id(1)
    layer, ids, there = _object(slab_index, num_layers, ids, object_blocks, object_bytes)
    right = tl.load(totals + slab_index // num_layers) == tl.load(num_escapes + slab_index // num_layers)
    tl.store(flags + 2 * (slab_index // num_layers), OVERFULL, mask=right == 0)
    k = tl.arange(0, 8)[:, None]
    at = tile * RUN + tl.arange(0, RUN)
    element = k * run_bytes + at[None, :]
    inside = (at < run_bytes)[None, :] & (element < tl.where(right, slab, 0))
    code = _codes(codes + there + layer.to(tl.int64) * 3 * run_bytes, k, at, run_bytes)
    escaped = inside & (code == 7)
    order = tl.cumsum(tl.where(escaped, 1, 0), axis=1) - 1
    place = tl.load(starts + (slab_index * 8 + k) * tiles + tile) + order
    outside = tl.load(escapes + there + place, mask=escaped, other=0).to(tl.int32)
    lowest = tl.load(base + there + layer * PERIOD + element % PERIOD, mask=inside, other=0).to(tl.int32)
    exponent = tl.where(escaped, outside, (lowest + code) & 0xFF)
    kept = tl.load(rest + there + layer.to(tl.int64) * slab + element, mask=inside, other=0).to(tl.int32)
    word = (exponent << 7) | (kept & 0x7F) | ((kept & 0x80) << 8)
    page = tl.load(page_pointers + layer).to(tl.pointer_type(tl.int16))
    to = _where(
        ids, tokens, channels, element // PERIOD, element % PERIOD, inside, block_stride, BLOCK_TOKENS, HEAD_DIM, PLANES
    )
    tl.store(page + to, word.to(tl.int16), mask=inside)
