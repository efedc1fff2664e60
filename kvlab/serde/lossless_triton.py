"""`lossless` decoded on a GPU: the same parts, two kernels, no wait for the CPU.

Kernel one counts the escapes of each run of codes, a prefix sum says where each run's escapes begin, kernel two
writes the words. Held against `LosslessSerde.decode`; runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1).
bf16 only: it is the format that KV is served in, and the one whose rest is exactly one byte.
"""

import torch
import triton
import triton.language as tl

from kvlab.errors import ConfigError
from kvlab.serde.base import Encoded
from kvlab.serde.window import Window

RUN = 512  # codes of one of a slab's eight runs that a program handles


def decode_on_device(encoded: Encoded, device: torch.device | str, out: torch.Tensor | None = None) -> torch.Tensor:
    """The KV of a lossless bf16 chunk, decoded on `device` from parts that are copied there (or lie there already)."""
    params = encoded.params
    if params.get("coding") != "window" or params.get("element") != "bfloat16":
        raise ConfigError(f"the GPU decoder reads bf16 windows, got {str(dict(params))[:80]}; use LosslessSerde.decode")
    parts = {name: part.to(device, non_blocking=True) for name, part in encoded.parts.items()}
    if out is None:
        out = torch.empty(encoded.shape, dtype=getattr(torch, encoded.dtype), device=device)
    num_words = out.numel() * out.element_size() // 2
    window = Window.of(encoded.shape, encoded.axes, num_words, params["rows"], params["period"])
    decode_parts(parts, window, out.view(torch.int16) if out.element_size() == 2 else out.view(-1).view(torch.int16))
    return out


def decode_parts(parts: dict[str, torch.Tensor], window: Window, words: torch.Tensor) -> None:
    """Write int16 `words` (contiguous) from parts that lie on its device. Enqueued only: nothing is waited for."""
    codes = parts["payload.codes"]
    slabs, run_bytes = codes.shape[0], codes.shape[2]
    slab = window.rows * window.period
    tiles = triton.cdiv(run_bytes, RUN)
    counts = torch.empty((slabs, 8, tiles), dtype=torch.int32, device=words.device)
    grid = (slabs, tiles)
    _count[grid](codes, counts, run_bytes, slab, tiles, RUN=RUN)
    ends = torch.cumsum(counts.view(-1), 0, dtype=torch.int64)
    starts = ends - counts.view(-1)
    escapes = parts["payload.escapes"]
    _join[grid](
        codes, parts["payload.rest"], escapes, parts["tables.base"], starts, words,
        run_bytes, slab, tiles, window.tables, window.period, max(1, escapes.numel()), RUN=RUN,
    )  # fmt: skip


@triton.jit
def _code(codes, slab_index, k, at, inside, run_bytes):
    """Code k of byte positions `at`: three bits that begin at bit 3k of the position's 24."""
    first = codes + slab_index.to(tl.int64) * 3 * run_bytes + at
    a = tl.load(first, mask=inside, other=0).to(tl.int32)
    b = tl.load(first + run_bytes, mask=inside, other=0).to(tl.int32)
    c = tl.load(first + 2 * run_bytes, mask=inside, other=0).to(tl.int32)
    return ((a | (b << 8) | (c << 16)) >> (3 * k)) & 7


@triton.jit
def _count(codes, counts, run_bytes, slab, tiles, RUN: tl.constexpr):
    """Escapes of one tile: 8 runs of RUN codes of a slab."""
    slab_index, tile = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, 8)[:, None]
    at = (tile * RUN + tl.arange(0, RUN))[None, :]
    inside = (at < run_bytes) & (k * run_bytes + at < slab)
    code = _code(codes, slab_index, k, at, inside, run_bytes)
    escaped = tl.sum(tl.where(inside & (code == 7), 1, 0), axis=1)
    tl.store(counts + (slab_index * 8 + tl.arange(0, 8)) * tiles + tile, escaped)


@triton.jit
def _join(
    codes, rest, escapes, base, starts, words, run_bytes, slab, tiles, tables, period, num_escapes, RUN: tl.constexpr
):
    """Words of one tile."""
    slab_index, tile = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, 8)[:, None]
    at = (tile * RUN + tl.arange(0, RUN))[None, :]
    element = k * run_bytes + at
    inside = (at < run_bytes) & (element < slab)
    code = _code(codes, slab_index, k, at, inside, run_bytes)
    escaped = inside & (code == 7)
    order = tl.cumsum(tl.where(escaped, 1, 0), axis=1) - 1
    start = tl.load(starts + (slab_index * 8 + k) * tiles + tile)
    place = tl.minimum(start + order, num_escapes - 1)  # a broken chunk must not read elsewhere
    outside = tl.load(escapes + place, mask=escaped, other=0).to(tl.int32)
    lowest = tl.load(base + (slab_index % tables) * period + element % period, mask=inside, other=0).to(tl.int32)
    exponent = tl.where(escaped, outside, lowest + code)
    flat = slab_index.to(tl.int64) * slab + element
    kept = tl.load(rest + flat, mask=inside, other=0).to(tl.int32)
    word = (exponent << 7) | (kept & 0x7F) | ((kept & 0x80) << 8)
    tl.store(words + flat, word.to(tl.int16), mask=inside)
