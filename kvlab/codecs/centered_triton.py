"""`centered` on a GPU: what is left of KV once the known is taken away, as float32 beside the pages, and back.

The twin is `kvlab.serde.centered`, and the bits agree: turns are taken in float64 with its own tables of cosines and
sines, and sums in its order. A program has all tokens of a block, for some pairs of a head's channels. What is left
lies in room of its own, (blocks, layers, tokens, kv_heads, kv, head_dim), which the programs of `int4` and `int8` read
and write as if it were pages.
"""

from typing import Any

import triton
import triton.language as tl

from kvlab.codecs.scaled_triton import _columns, _page, _read, _rows, _write

ROOM = tl.constexpr(0.25)  # as in `kvlab.serde.centered`
jit: Any = triton.jit


@jit
def _mean(values, count, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """Means over tokens, float64: the upper half is added to the lower one until one number is left."""
    for stage in tl.static_range(0, 16):
        if (TOKENS >> stage) > 1:
            halves = tl.reshape(values, [2, TOKENS >> (stage + 1), PAIRS])
            lower, upper = tl.split(tl.permute(halves, (1, 2, 0)))
            values = lower + upper
    return tl.reshape(values, [PAIRS]) / count + 0.0


@jit
def _there(room, block, layer, token, head, plane, num_layers, block_tokens, num_heads, head_dim):
    """Where the channels of each token's head begin in the room."""
    row = ((block.to(tl.int64) * num_layers + layer) * block_tokens + token) * num_heads + head
    return room + (row * 2 + plane) * head_dim


@jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids"])
def _centre(
    page_pointers, ids, tokens, heads, channels, first, second, cosines, sines, room, mean,
    num_layers, object_bytes, block_stride, block_tokens, num_tokens, num_heads, head_dim, num_pairs,
    FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Keys: turned back, a fourth as large, without the mean of each channel, which goes to `mean`."""
    block, layer, head = tl.program_id(0) // num_layers, tl.program_id(0) % num_layers, tl.program_id(1)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    token = tl.arange(0, TOKENS)
    live = token < num_tokens
    rows = _rows(ids + block, tokens, token, live, block_tokens, block_stride, ALIGN)
    pair = tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    known = pair < num_pairs
    one = tl.load(first + pair, mask=known, other=0)
    two = tl.load(second + pair, mask=known, other=0)
    has_two = known & (two < head_dim)
    inside, beside = live[:, None] & known[None, :], live[:, None] & has_two[None, :]
    a = _read(page, rows, _columns(channels, one, known, STRIDE), inside, FLOAT).to(tl.float64)
    b = _read(page, rows, _columns(channels, two, has_two, STRIDE), beside, FLOAT).to(tl.float64)
    spot = token[:, None] * num_pairs + pair[None, :]
    cosine, sine = tl.load(cosines + spot, mask=inside, other=0.0), tl.load(sines + spot, mask=inside, other=0.0)
    left = (a * cosine + b * sine) * ROOM  # the sines are those of a turn forth
    right = (b * cosine - a * sine) * ROOM
    count = num_tokens.to(tl.float64)
    left_mean = _mean(left, count, TOKENS, PAIRS).to(tl.float32)
    right_mean = _mean(right, count, TOKENS, PAIRS).to(tl.float32)
    means = mean + block.to(tl.int64) * (object_bytes // 4) + (layer * num_heads + head) * head_dim
    tl.store(means + one, left_mean, mask=known)
    tl.store(means + two, right_mean, mask=has_two)
    there = _there(room, block, layer, token, head, 0, num_layers, block_tokens, num_heads, head_dim)
    tl.store(there[:, None] + one[None, :], (left - left_mean.to(tl.float64)[None, :]).to(tl.float32), mask=inside)
    tl.store(there[:, None] + two[None, :], (right - right_mean.to(tl.float64)[None, :]).to(tl.float32), mask=beside)


@jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids"])
def _restore(
    page_pointers, ids, tokens, heads, channels, first, second, cosines, sines, room, mean,
    num_layers, object_bytes, block_stride, block_tokens, num_tokens, num_heads, head_dim, num_pairs,
    FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, PAIRS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """What `_centre` left, and its means, into keys."""
    block, layer, head = tl.program_id(0) // num_layers, tl.program_id(0) % num_layers, tl.program_id(1)
    token = tl.arange(0, TOKENS)
    live = token < num_tokens
    pair = tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    known = pair < num_pairs
    one = tl.load(first + pair, mask=known, other=0)
    two = tl.load(second + pair, mask=known, other=0)
    has_two = known & (two < head_dim)
    inside, beside = live[:, None] & known[None, :], live[:, None] & has_two[None, :]
    there = _there(room, block, layer, token, head, 0, num_layers, block_tokens, num_heads, head_dim)
    means = mean + block.to(tl.int64) * (object_bytes // 4) + (layer * num_heads + head) * head_dim
    a = tl.load(there[:, None] + one[None, :], mask=inside, other=0.0).to(tl.float64)
    b = tl.load(there[:, None] + two[None, :], mask=beside, other=0.0).to(tl.float64)
    a += tl.load(means + one, mask=known, other=0.0).to(tl.float64)[None, :]
    b += tl.load(means + two, mask=has_two, other=0.0).to(tl.float64)[None, :]
    spot = token[:, None] * num_pairs + pair[None, :]
    cosine, sine = tl.load(cosines + spot, mask=inside, other=0.0), tl.load(sines + spot, mask=inside, other=0.0)
    left, right = (a * cosine - b * sine) / ROOM, (b * cosine + a * sine) / ROOM
    left = tl.minimum(tl.maximum(left, -LARGEST), LARGEST).to(tl.float32)
    right = tl.minimum(tl.maximum(right, -LARGEST), LARGEST).to(tl.float32)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    rows = _rows(ids + block, tokens, token, live, block_tokens, block_stride, ALIGN)
    _write(page, rows, _columns(channels, one, known, STRIDE), inside, left, FLOAT)
    _write(page, rows, _columns(channels, two, has_two, STRIDE), beside, right, FLOAT)


@jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids"])
def _values(
    page_pointers, ids, tokens, heads, channels, room,
    num_layers, block_stride, block_tokens, num_tokens, num_heads, head_dim,
    FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Values, a fourth as large."""
    block, layer, head = tl.program_id(0) // num_layers, tl.program_id(0) % num_layers, tl.program_id(1)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    token, place = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    rows = _rows(ids + block, tokens, token, token < num_tokens, block_tokens, block_stride, ALIGN)
    inside = (token < num_tokens)[:, None] & (place < head_dim)[None, :]
    there = _there(room, block, layer, token, head, 1, num_layers, block_tokens, num_heads, head_dim)
    value = _read(page, rows, _columns(channels, place, place < head_dim, STRIDE), inside, FLOAT)
    tl.store(there[:, None] + place[None, :], value * ROOM, mask=inside)


@jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["ids"])
def _restore_values(
    page_pointers, ids, tokens, heads, channels, room,
    num_layers, block_stride, block_tokens, num_tokens, num_heads, head_dim,
    FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """What `_values` left and a codec coded, into values."""
    block, layer, head = tl.program_id(0) // num_layers, tl.program_id(0) % num_layers, tl.program_id(1)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    token, place = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    rows = _rows(ids + block, tokens, token, token < num_tokens, block_tokens, block_stride, ALIGN)
    inside = (token < num_tokens)[:, None] & (place < head_dim)[None, :]
    there = _there(room, block, layer, token, head, 1, num_layers, block_tokens, num_heads, head_dim)
    wide = tl.load(there[:, None] + place[None, :], mask=inside, other=0.0).to(tl.float64) / ROOM
    value = tl.minimum(tl.maximum(wide, -LARGEST), LARGEST).to(tl.float32)
    _write(page, rows, _columns(channels, place, place < head_dim, STRIDE), inside, value, FLOAT)
