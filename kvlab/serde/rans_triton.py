"""The decoder of `kvlab.serde.rans` on a GPU: one thread a lane, all lanes of all planes at once.

Held against the reference; runs on a CPU in Triton's interpreter (TRITON_INTERPRET=1). The search for a symbol is a
fixed number of halvings over `cum`, which all threads of a warp do in step.
"""

import torch
import triton
import triton.language as tl

from kvlab.serde.rans import PRECISION

LANES = 32  # lanes of one program: a warp, so that a long lane holds up only its neighbours


def decode_on_device(
    words: torch.Tensor, starts: torch.Tensor, index: torch.Tensor, cum: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symbols (planes, steps, channels) uint8 and what to check, all on the device of `words`.

    `words` int16, `starts` int64 (planes, lanes), `index` int32 (planes, channels), `cum` int16 (tables, symbols + 1),
    as in `rans.Model`. The second result is (planes, lanes, 2) int64: last state and words taken. The caller compares
    it with 2**16 and the lane's length when it next waits for the device anyway.
    """
    planes, channels = index.shape
    lanes = starts.shape[1]
    out = torch.empty((planes, steps, channels), dtype=torch.uint8, device=words.device)
    ended = torch.empty((planes, lanes, 2), dtype=torch.int64, device=words.device)
    halvings = max(1, (cum.shape[1] - 2).bit_length())
    grid = (planes, triton.cdiv(lanes, LANES))
    _decode[grid](
        words, starts, index, cum, out, ended, words.numel(), steps, channels, lanes, channels // lanes,
        cum.shape[1], HALVINGS=halvings, LANES=LANES, PRECISION=PRECISION, num_warps=1,
    )  # fmt: skip
    return out, ended


@triton.jit
def _decode(
    words, starts, index, cum, out, ended, num_words, steps, channels, lanes, per_lane, width,
    HALVINGS: tl.constexpr, LANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    live = lane < lanes
    start = tl.load(starts + plane * lanes + lane, mask=live, other=0)
    high = tl.load(words + start, mask=live, other=0).to(tl.int64) & 0xFFFF
    low_word = tl.load(words + start + 1, mask=live, other=0).to(tl.int64) & 0xFFFF
    state = (high << 16) | low_word
    at = start + 2
    total_mask = (1 << PRECISION) - 1
    for step in range(steps):
        for turn in range(per_lane):
            channel = turn * lanes + lane
            table = tl.load(index + plane * channels + channel, mask=live, other=0).to(tl.int64)
            row = cum + table * width
            slot = state & total_mask
            below = tl.zeros((LANES,), tl.int32)  # the symbol lies in [below, above)
            above = tl.zeros((LANES,), tl.int32) + (width - 1)
            for _ in tl.static_range(HALVINGS):
                middle = (below + above) >> 1
                reached = tl.load(row + middle, mask=live, other=0).to(tl.int64) <= slot
                below = tl.where(reached, middle, below)
                above = tl.where(reached, above, middle)
            first = tl.load(row + below, mask=live, other=0).to(tl.int64)
            last = tl.load(row + below + 1, mask=live, other=0).to(tl.int64)
            state = (last - first) * (state >> PRECISION) + slot - first
            word = tl.load(words + tl.minimum(at, num_words - 1), mask=live, other=0).to(tl.int64) & 0xFFFF
            empty = state < 65536
            state = tl.where(empty, (state << 16) | word, state)
            at += tl.where(empty, 1, 0)
            tl.store(out + (plane * steps + step) * channels + channel, below.to(tl.uint8), mask=live)
    tl.store(ended + (plane * lanes + lane) * 2, state, mask=live)
    tl.store(ended + (plane * lanes + lane) * 2 + 1, at - start, mask=live)
