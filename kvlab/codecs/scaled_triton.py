"""The scaled kinds on a GPU: pages to codes and scales in one pass, and back.

The twin is `kvlab.serde.quantized`, and the bytes agree. So every operation rounds as it does there: divisions are
IEEE's, a multiplication and an addition are never fused (launched with ``enable_fp_fusion=False``), and rounding to a
shorter float is done on bits, which is the same everywhere and in Triton's interpreter. One thing is decided by group
and not by plane: whether numbers are so large that sums are taken at a smaller scale. The scale is a power of two, so
the codes are the same unless a plane holds numbers above 2**100 and below 2**-110 at once.

A program reads one head's tokens through the tables of the page map. Groups by token lie in a row of its tile; groups
by channel take two passes over their tokens, the second from the cache.
"""

from typing import Any

import triton
import triton.language as tl

INT8, FP8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {"int8": INT8.value, "fp8": FP8.value, "int4": INT4.value}
BFLOAT16, FLOAT16, FLOAT32 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FLOATS = {"bfloat16": BFLOAT16.value, "float16": FLOAT16.value, "float32": FLOAT32.value}
WORDS = {"bfloat16": tl.int16, "float16": tl.float16, "float32": tl.float32}
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds to the nearest even integer
LARGE, SMALL = tl.constexpr(2.0**100), tl.constexpr(2.0**-16)  # see `away_from_the_end`
LIMIT = tl.constexpr(3.3895313892515355e38)  # bf16's largest
INFINITY = tl.constexpr(float("inf"))
NON_FINITE = tl.constexpr(1)  # what `flags` says
jit: Any = triton.jit


@jit
def _rounded_to_bf16(values):
    """Bits of the nearest bf16, ties to even, as int32; of finite float32."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@jit
def _bf16(bits):
    """float32 of a bf16's bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def _without_sign_of_zero(bits):
    return tl.where(bits == 0x8000, 0, bits)


@jit
def _rows(ids, tokens, first, live, block_tokens, block_stride, ALIGN: tl.constexpr):
    """Where tokens begin, in elements from a layer's first page."""
    block = tl.load(ids + first // block_tokens, mask=live, other=0).to(tl.int64)
    row = block * block_stride + tl.load(tokens + first % block_tokens, mask=live, other=0)
    return tl.multiple_of(row, ALIGN)  # 1 where nothing is known: so many elements are one access


@jit
def _object(slab, num_layers, ids, payload, scales, scales_low, object_blocks, object_bytes):
    """A slab's layer, and what belongs to its object: objects of one size lie one after the other."""
    at = slab // num_layers
    there = at.to(tl.int64) * object_bytes
    payload, scales, scales_low = payload + there, scales + there // 2, scales_low + there // 2
    return slab % num_layers, ids + at * object_blocks, payload, scales, scales_low


@jit
def _page(page_pointers, layer, heads, head, WORD: tl.constexpr, ALIGN: tl.constexpr):
    """Where a head's elements begin in a layer's first page."""
    page = tl.load(page_pointers + layer).to(tl.pointer_type(WORD)) + tl.load(heads + head)
    return tl.multiple_of(page, 16) if ALIGN > 1 else page


@jit
def _columns(channels, channel, inside, STRIDE: tl.constexpr):
    """Where channels lie from there, in elements; a table where no stride says it."""
    return channel * STRIDE if STRIDE else tl.load(channels + channel, mask=inside, other=0)


@jit
def _read(page, rows, columns, inside, FLOAT: tl.constexpr):
    """float32 of a tile."""
    value = tl.load(page + (rows[:, None] + columns[None, :]), mask=inside, other=0)
    return _bf16(value) if FLOAT == BFLOAT16 else value.to(tl.float32)


@jit
def _is_odd(values, inside):
    """1 where a value is NaN or infinite."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside & (bits >= 0x7F800000), 1, 0)


@jit
def _symmetric(top, KIND: tl.constexpr):
    """Bits of a symmetric scale, and its inverse."""
    if KIND == INT8:
        scale = _rounded_to_bf16(tl.div_rn(top, top * 0 + 127.0))
    else:
        scale = _rounded_to_bf16(tl.div_rn(top, top * 0 + 448.0))
    wide = _bf16(scale)
    inverse = tl.div_rn(wide * 0 + 1.0, tl.where(wide > 0, wide, 1.0))
    finite = (wide > 0) & ((inverse.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000)
    return scale, tl.where(finite, inverse, 0.0)


@jit
def _between(low, high):
    """Bits of low and step of codes 0..15, the inverse of the step, and the scale at which sums are taken."""
    low_bits = _without_sign_of_zero(_rounded_to_bf16(tl.minimum(tl.maximum(low, -LIMIT), LIMIT)))
    lowest = _bf16(low_bits)
    step = tl.div_rn(high, high * 0 + 15.0) - tl.div_rn(lowest, lowest * 0 + 15.0)
    step_bits = _without_sign_of_zero(_rounded_to_bf16(tl.minimum(tl.maximum(step, 0.0), LIMIT)))
    wide = _bf16(step_bits)
    small = tl.where(tl.maximum(tl.abs(lowest), tl.abs(high)) > LARGE, SMALL, 1.0)
    inverse = tl.div_rn(wide * 0 + 1.0, tl.where(wide > 0, wide * small, 1.0))
    return low_bits, step_bits, tl.where(wide > 0, tl.minimum(inverse, LIMIT), 0.0), small


@jit
def _coded(values, inverse, KIND: tl.constexpr):
    """Codes of symmetric kinds, int32."""
    scaled = values * inverse
    if KIND == INT8:
        bounded = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        code = ((bounded + ROUND) - ROUND).to(tl.int32)
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        size = tl.minimum(tl.abs(scaled), 448.0)
        near = size.to(tl.int32, bitcast=True)
        normal = ((near + 0x7FFFF + ((near >> 20) & 1)) >> 20) - 960  # the exponents' middles: 127 and 7
        tiny = ((size * 512.0 + ROUND) - ROUND).to(tl.int32)
        code = tl.where(size < 0.015625, tiny, normal) | ((bits >> 24) & 0x80)
    return code


@jit
def _coded4(values, low, inverse, small):
    """Codes 0..15, int32."""
    code = (values * small - low * small) * inverse
    return ((tl.minimum(tl.maximum(code, 0.0), 15.0) + ROUND) - ROUND).to(tl.int32)


@jit
def _store_codes(payload, at, values, inside, inverse, KIND: tl.constexpr):
    tl.store(payload + at, _coded(values, inverse, KIND).to(tl.int8), mask=inside)


# Sizes vary from object to object, and ids and flags begin anywhere in their tables: a program for each would be
# compiled in the middle of serving.
@jit(do_not_specialize=["num_tokens", "first_token", "object_blocks"], do_not_specialize_on_alignment=["ids", "flags"])
def _encode_by_token(
    page_pointers, ids, tokens, heads, channels, payload, scales, scales_low, flags,
    num_layers, object_blocks, object_bytes, block_stride, block_tokens,
    num_tokens, first_token, num_heads, first_channel, num_groups, group, run,
    KIND: tl.constexpr, FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Groups along head_dim: `num_groups` of `group` channels from `first_channel` on, each token its own; `run` bytes
    of codes in each."""
    tiles = tl.cdiv(num_tokens, TOKENS)
    tile = tl.program_id(0) % tiles
    layer, ids, payload, scales, scales_low = _object(
        tl.program_id(0) // tiles, num_layers, ids, payload, scales, scales_low, object_blocks, object_bytes
    )
    flags += (tl.program_id(0) // tiles // num_layers) * 2
    head, piece = tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    rows = _rows(ids, tokens, first_token + token, live, block_tokens, block_stride, ALIGN)
    # A row of scales for each token, head and group; behind it the codes of `group` channels.
    row = ((layer.to(tl.int64) * num_tokens + token) * num_heads + head) * num_groups + piece
    start = first_channel + piece * group
    if KIND == INT4:
        place = tl.arange(0, CHANNELS)
        lower = live[:, None] & (place < run)[None, :]
        upper = live[:, None] & (run + place < group)[None, :]
        first = _read(page, rows, _columns(channels, start + place, place < run, STRIDE), lower, FLOAT)
        columns = _columns(channels, start + run + place, run + place < group, STRIDE)
        second = _read(page, rows, columns, upper, FLOAT)
        odd = tl.max(tl.max(_is_odd(first, lower) | _is_odd(second, upper), axis=1), axis=0)
        low = tl.minimum(
            tl.min(tl.where(lower, first, INFINITY), axis=1), tl.min(tl.where(upper, second, INFINITY), axis=1)
        )
        high = tl.maximum(
            tl.max(tl.where(lower, first, -INFINITY), axis=1), tl.max(tl.where(upper, second, -INFINITY), axis=1)
        )
        low, high = tl.where(live, low, 0.0), tl.where(live, high, 0.0)
        low_bits, step_bits, inverse, small = _between(low, high)
        lowest = _bf16(low_bits)[:, None]
        code = _coded4(first, lowest, inverse[:, None], small[:, None])
        above = _coded4(second, lowest, inverse[:, None], small[:, None])
        packed = code | tl.where(upper, above << 4, 0)
        tl.store(payload + row[:, None] * run + place[None, :], packed.to(tl.int8), mask=lower)
        tl.store(scales + row, step_bits.to(tl.int16), mask=live)
        tl.store(scales_low + row, low_bits.to(tl.int16), mask=live)
    else:
        place = tl.arange(0, CHANNELS)
        inside = live[:, None] & (place < group)[None, :]
        values = _read(page, rows, _columns(channels, start + place, place < group, STRIDE), inside, FLOAT)
        odd = tl.max(tl.max(_is_odd(values, inside), axis=1), axis=0)
        scale, inverse = _symmetric(tl.max(tl.abs(values), axis=1), KIND)
        _store_codes(payload, row[:, None] * group + place[None, :], values, inside, inverse[:, None], KIND)
        tl.store(scales + row, scale.to(tl.int16), mask=live)
    tl.store(flags, NON_FINITE, mask=odd > 0)


@jit(
    do_not_specialize=["num_groups", "group", "first_token", "object_blocks"],
    do_not_specialize_on_alignment=["ids", "flags"],
)
def _encode_by_channel(
    page_pointers, ids, tokens, heads, channels, payload, scales, scales_low, flags,
    num_layers, object_blocks, object_bytes, block_stride, block_tokens,
    num_groups, group, first_token, num_heads, head_dim, half,
    KIND: tl.constexpr, FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Groups along tokens: `num_groups` of `group` tokens from `first_token` on, each channel its own. A program has
    CHANNELS channels of a head (of 4-bit kinds: CHANNELS of its lower half and as many of its upper); `half` bytes of
    codes are a head's."""
    piece = tl.program_id(0) % num_groups
    layer, ids, payload, scales, scales_low = _object(
        tl.program_id(0) // num_groups, num_layers, ids, payload, scales, scales_low, object_blocks, object_bytes
    )
    flags += (tl.program_id(0) // num_groups // num_layers) * 2
    head = tl.program_id(1)
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    place = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    left, right = place < half, half + place < head_dim
    columns = _columns(channels, place, left, STRIDE)
    other = _columns(channels, half + place, right, STRIDE)
    start = first_token + piece * group
    odd = 0
    low = tl.zeros([CHANNELS], tl.float32) + INFINITY
    high = -low
    low_right, high_right = low, high
    for at in range(0, group, TOKENS):
        token = at + tl.arange(0, TOKENS)
        live = token < group
        rows = _rows(ids, tokens, start + token, live, block_tokens, block_stride, ALIGN)
        inside = live[:, None] & left[None, :]
        values = _read(page, rows, columns, inside, FLOAT)
        odd |= tl.max(tl.max(_is_odd(values, inside), axis=1), axis=0)
        low = tl.minimum(low, tl.min(tl.where(inside, values, INFINITY), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, values, -INFINITY), axis=0))
        if KIND == INT4:
            inside = live[:, None] & right[None, :]
            values = _read(page, rows, other, inside, FLOAT)
            odd |= tl.max(tl.max(_is_odd(values, inside), axis=1), axis=0)
            low_right = tl.minimum(low_right, tl.min(tl.where(inside, values, INFINITY), axis=0))
            high_right = tl.maximum(high_right, tl.max(tl.where(inside, values, -INFINITY), axis=0))
    # One scale a channel for the group; codes are (group, tokens, heads, channels).
    of_group = layer.to(tl.int64) * num_groups + piece
    scale_at = (of_group * num_heads + head) * head_dim + place
    low, high = tl.where(left, low, 0.0), tl.where(left, high, 0.0)
    low_right, high_right = tl.where(right, low_right, 0.0), tl.where(right, high_right, 0.0)
    if KIND == INT4:
        low_bits, step_bits, inverse, small = _between(low, high)
        low_bits_right, step_bits_right, inverse_right, small_right = _between(low_right, high_right)
        tl.store(scales + scale_at, step_bits.to(tl.int16), mask=left)
        tl.store(scales_low + scale_at, low_bits.to(tl.int16), mask=left)
        tl.store(scales + scale_at + half, step_bits_right.to(tl.int16), mask=right)
        tl.store(scales_low + scale_at + half, low_bits_right.to(tl.int16), mask=right)
        lowest, lowest_right = _bf16(low_bits), _bf16(low_bits_right)
    else:
        scale, inverse = _symmetric(tl.maximum(tl.abs(low), tl.abs(high)), KIND)
        tl.store(scales + scale_at, scale.to(tl.int16), mask=left)
    for at in range(0, group, TOKENS):
        token = at + tl.arange(0, TOKENS)
        live = token < group
        rows = _rows(ids, tokens, start + token, live, block_tokens, block_stride, ALIGN)
        inside = live[:, None] & left[None, :]
        values = _read(page, rows, columns, inside, FLOAT)
        to = ((of_group * group + token) * num_heads + head)[:, None] * half + place[None, :]
        if KIND == INT4:
            code = _coded4(values, lowest[None, :], inverse[None, :], small[None, :])
            both = live[:, None] & right[None, :]
            values = _read(page, rows, other, both, FLOAT)
            above = _coded4(values, lowest_right[None, :], inverse_right[None, :], small_right[None, :])
            tl.store(payload + to, (code | tl.where(both, above << 4, 0)).to(tl.int8), mask=inside)
        else:
            _store_codes(payload, to, values, inside, inverse[None, :], KIND)
    tl.store(flags, NON_FINITE, mask=odd > 0)


@jit
def _decoded(code, scale, low, KIND: tl.constexpr, LARGEST: tl.constexpr):
    """float32 of codes, no further from zero than LARGEST."""
    if KIND == INT4:
        small = tl.where(scale > LARGE, SMALL, 1.0)
        wide = code.to(tl.float32) * (scale * small) + low * small
        end = LARGEST * small
        value = tl.minimum(tl.maximum(wide, -end), end) * tl.where(scale > LARGE, 65536.0, 1.0)
    else:
        if KIND == INT8:
            number = code.to(tl.float32)
        else:
            size = code & 0x7F
            normal = ((size + 960) << 20).to(tl.float32, bitcast=True)
            number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
            signed = number.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
            number = signed.to(tl.float32, bitcast=True)  # a minus sign may be 0 - x, which has no negative zero
        value = tl.minimum(tl.maximum(number * scale, -LARGEST), LARGEST)
    return value


@jit
def _write(page, rows, columns, inside, values, FLOAT: tl.constexpr):
    where = page + (rows[:, None] + columns[None, :])
    if FLOAT == BFLOAT16:
        tl.store(where, _rounded_to_bf16(values).to(tl.int16), mask=inside)
    elif FLOAT == FLOAT16:
        tl.store(where, values.to(tl.float16), mask=inside)
    else:
        tl.store(where, values, mask=inside)


@jit(
    do_not_specialize=["num_tokens", "first_token", "object_blocks", "num_groups", "group"],
    do_not_specialize_on_alignment=["ids"],
)
def _decode(
    page_pointers, ids, tokens, heads, channels, payload, scales, scales_low,
    num_layers, object_blocks, object_bytes, block_stride, block_tokens,
    num_tokens, first_token, num_heads, first_channel, num_groups, group, width, half,
    KIND: tl.constexpr, FLOAT: tl.constexpr, WORD: tl.constexpr, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BY_CHANNEL: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Codes to pages, for both ways to group: by token `num_groups` groups of `width` channels, by channel so many of
    `group` tokens and a head of `width` channels. A row of codes has `half` bytes."""
    tiles = tl.cdiv(num_tokens, TOKENS)
    tile = tl.program_id(0) % tiles
    layer, ids, payload, scales, scales_low = _object(
        tl.program_id(0) // tiles, num_layers, ids, payload, scales, scales_low, object_blocks, object_bytes
    )
    token = tile * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    rows = _rows(ids, tokens, first_token + token, live, block_tokens, block_stride, ALIGN)
    at_token = layer.to(tl.int64) * num_tokens + token
    if BY_CHANNEL:
        head, start = tl.program_id(1), 0
        code_row = at_token * num_heads + head
        scale_row = ((layer.to(tl.int64) * num_groups + token // group) * num_heads + head) * width
    else:
        head = tl.program_id(1) // num_groups
        start = first_channel + (tl.program_id(1) % num_groups) * width
        code_row = (at_token * num_heads + head) * num_groups + tl.program_id(1) % num_groups
        scale_row = code_row
    page = _page(page_pointers, layer, heads, head, WORD, ALIGN)
    place = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    left = live[:, None] & (place < half)[None, :]
    codes = tl.load(payload + (code_row[:, None] * half + place[None, :]), mask=left, other=0).to(tl.int32)
    if KIND == INT4:
        right = live[:, None] & (half + place < width)[None, :]
        if BY_CHANNEL:
            spot = scale_row[:, None] + place[None, :]
            scale = _bf16(tl.load(scales + spot, mask=left, other=0))
            low = _bf16(tl.load(scales_low + spot, mask=left, other=0))
            scale_right = _bf16(tl.load(scales + spot + half, mask=right, other=0))
            low_right = _bf16(tl.load(scales_low + spot + half, mask=right, other=0))
        else:
            scale = _bf16(tl.load(scales + scale_row, mask=live, other=0))[:, None]
            low = _bf16(tl.load(scales_low + scale_row, mask=live, other=0))[:, None]
            scale_right, low_right = scale, low
        values = _decoded(codes & 15, scale, low, KIND, LARGEST)
        _write(page, rows, _columns(channels, start + place, place < half, STRIDE), left, values, FLOAT)
        values = _decoded((codes >> 4) & 15, scale_right, low_right, KIND, LARGEST)
        columns = _columns(channels, start + half + place, half + place < width, STRIDE)
        _write(page, rows, columns, right, values, FLOAT)
    else:
        if BY_CHANNEL:
            scale = _bf16(tl.load(scales + (scale_row[:, None] + place[None, :]), mask=left, other=0))
        else:
            scale = _bf16(tl.load(scales + scale_row, mask=live, other=0))[:, None]
        values = _decoded(codes, scale, scale, KIND, LARGEST)
        _write(page, rows, _columns(channels, start + place, place < half, STRIDE), left, values, FLOAT)
