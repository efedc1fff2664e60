"""cachegen's last step compiled by numba: symbols to values in one pass, where torch needs six.

The same float32 operations in the same order as `CacheGenSerde._dequantize`, and so the same bytes. Import
`rans_fast` first: it makes numba's library fit to live beside an engine.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]
_BITS = {torch.bfloat16: (torch.int16, np.uint16), torch.float32: (torch.int32, np.uint32)}


def dequantize(
    symbols: Array, escapes: Array, radius: int, step: Array, base: Array, group: int, out: torch.Tensor
) -> bool:
    """Write ``(symbol - radius) * step + base`` to `out`; False, and nothing written, if its dtype or device is
    another.

    Parameters
    ----------
    symbols
        uint8 (planes, steps, channels); 2 * radius + 1 stands for the next of `escapes` (int16).
    step
        float32 (planes, channels).
    base
        float32 (planes, groups, channels): the values of the anchors, which lead their groups; with `group` 0 the
        centers (planes, 1, channels), and every token is a step.
    out
        in host memory, bfloat16 or float32 (layers, kv, tokens, kv_heads, head_dim), any strides.
    """
    if out.dtype not in _BITS or out.device.type != "cpu":
        return False
    integer, unsigned = _BITS[out.dtype]
    bits = out.view(integer).numpy().view(unsigned)
    _dequantize(symbols, escapes, np.float32(radius), np.uint8(2 * radius + 1), step, base, group, bits)
    return True


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _dequantize(
    symbols: Array, escapes: Array, radius: float, escape: int, step: Array, base: Array, group: int, out: Array
) -> None:
    planes, channels = step.shape
    tokens, heads, dim = out.shape[2:]
    values = np.empty(channels, np.float32)
    bits = values.view(np.uint32)
    taken = 0
    for plane in range(planes):
        row = 0
        for token in range(tokens):
            first = base[plane, token // group if group else 0]
            if group and token % group == 0:
                values[:] = first
            else:
                codes = symbols[plane, row]
                row += 1
                escaped = False
                for channel in range(channels):
                    values[channel] = np.float32(codes[channel]) - radius
                    escaped |= codes[channel] == escape
                if escaped:  # rare, and a loop without this inside is one the compiler can vectorize
                    for channel in range(channels):
                        if codes[channel] == escape:
                            values[channel] = np.float32(escapes[taken])
                            taken += 1
                for channel in range(channels):
                    values[channel] = values[channel] * step[plane, channel] + first[channel]
            for head in range(heads):
                target = out[plane // 2, plane % 2, token, head]
                for at in range(dim):
                    word = bits[head * dim + at]
                    if out.itemsize == 2:  # bfloat16: round to nearest, ties to even
                        word = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                    target[at] = word
