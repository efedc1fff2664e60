"""Bit-exact and about 1.4 times smaller (bf16): exponents as 3-bit places in a window of their channel.

The sign and mantissa of a KV element are noise, but its exponent is not: within a channel nearly all exponents lie
in the seven values below the channel's largest. So an exponent becomes a 3-bit code, its distance from the
channel's window base, and the few outside (2-3 % on real KV) become code 7 and a whole byte in a list. An
entropy coder would save another 0.2-0.5 bits an element (Huffman, arithmetic) but costs an order of magnitude in
speed, needs tables, and does not run well on a GPU; this is a dozen shifts and masks that run at memory speed.
"""

from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde import bitpack
from kvlab.serde.base import Encoded, Serde, checked_out, torch_dtype
from kvlab.serde.floats import FORMATS, FloatFormat
from kvlab.serde.window import WIDTH, Window, best_window, detect_element

ESCAPE = WIDTH  # the eighth 3-bit code
# Elements that are worked on at once: small enough for a core's L2 cache, large enough to hide numpy's call costs.
BATCH = 1 << 18
LEAST_PERIOD = 32  # columns of a window; with fewer the compiled loops are too short to gain
COMPILED = ("payload.codes", "payload.rest", "payload.escapes", "tables.base")
NAMES = ("payload.codes", "payload.rest", "payload.bits", "payload.escapes", "tables.base")


class LosslessSerde(Serde):
    """Every bit comes back, for bf16, fp16, fp32, both fp8, and for an engine's opaque pages of any of these.

    `element` names the float inside opaque ``uint8`` pages; without it the serde tries all five on a sample and
    takes the one that packs best (a wrong guess costs size, never a bit). What was taken is written in the chunk.
    """

    name = "lossless"
    lossless = True

    def __init__(self, element: str = "auto") -> None:
        if element != "auto" and element not in FORMATS:
            raise ConfigError(f"element must be auto, {', '.join(FORMATS)}; got {element!r}")
        self.element = element

    @property
    def spec(self) -> str:
        return self.name if self.element == "auto" else f"{self.name}:element={self.element}"

    def prepare(self) -> None:
        kv = torch.zeros(1, 128, 1, 1, 64, dtype=torch.bfloat16)
        self.decode(self.encode(kv, AXES))

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        host = kv.detach().cpu().contiguous()
        raw = host.reshape(-1).view(torch.uint8).numpy()
        dtype = str(kv.dtype).removeprefix("torch.")
        shape = tuple(kv.shape)
        element = dtype if dtype in FORMATS else self._element(raw, shape)
        params: dict[str, Any] = {"coding": "raw"}
        parts = {"payload.rest": raw}
        if raw.size and element is not None:
            words = raw.view(FORMATS[element].word)
            window = best_window(words, FORMATS[element], shape, axes)
            coded = _encode(words, FORMATS[element], window)
            if sum(part.nbytes for part in coded.values()) < raw.nbytes:
                parts = coded
                params = {"coding": "window", "element": element, "rows": window.rows, "period": window.period}
        tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
        if params["coding"] == "raw":
            tensors["payload.rest"] = tensors["payload.rest"].clone()
        return Encoded(self.name, shape, dtype, axes, tensors, params)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        parts = {}
        for name in NAMES:
            part = encoded.parts.get(name)
            if part is not None:
                if part.dtype != torch.uint8:
                    raise FormatError(f"part {name!r} of lossless must be uint8, got {part.dtype}")
                parts[name] = part.numpy()
        dtype = torch_dtype(encoded)
        num_bytes = prod(encoded.shape) * dtype.itemsize
        fmt, window = _checked(encoded, parts, num_bytes)
        result = checked_out(encoded, out)
        target = result if result.device.type == "cpu" else torch.empty(encoded.shape, dtype=dtype)
        flat = target.reshape(-1).view(torch.uint8).numpy()
        if fmt is None or window is None:
            flat[:] = parts["payload.rest"]
        else:
            _decode(parts, fmt, window, flat.view(fmt.word))
        return result if target is result else result.copy_(target)

    def _element(self, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> str | None:
        """The float inside opaque bytes, or None where no float fits their number."""
        width = shape[-1] if shape else 1
        fitting = {name: fmt for name, fmt in FORMATS.items() if width % fmt.item_bytes == 0}
        return self.element if self.element in fitting else detect_element(raw, fitting)


def _encode(words: NDArray[Any], fmt: FloatFormat, window: Window) -> dict[str, NDArray[np.uint8]]:
    """Parts of `words` (flat, in memory order)."""
    fast = _compiled(fmt, window)
    if fast is not None:
        return dict(zip(COMPILED, fast.encode(words, window), strict=True))
    grid = words.reshape(window.outer * window.tables, window.rows * window.period)
    lanes, bits = divmod(fmt.rest_bits, 8)
    codes = np.empty(bitpack.packed_shape(*grid.shape, 3), np.uint8)
    rest = np.empty((lanes, words.size), np.uint8)
    packed_bits = np.empty(bitpack.packed_shape(*grid.shape, bits) if bits else (0, 1, 0), np.uint8)
    escapes = []
    base = window.base(words, fmt)
    for start, stop in window.batches(BATCH):
        piece = grid[start:stop]
        exponent = fmt.exponent(piece).reshape(-1, window.rows, window.period)
        below = np.subtract(exponent, window.bases_of(base, start, stop))  # wraps: below the base is above the window
        outside = below >= ESCAPE
        escapes.append(exponent[outside])
        np.minimum(below, ESCAPE, out=below)
        codes[start:stop] = bitpack.pack(below.reshape(piece.shape), 3)
        left = fmt.rest(piece)
        flat = slice(start * grid.shape[1], stop * grid.shape[1])
        for lane in range(lanes):
            rest[lane, flat] = (left >> (8 * lane)).reshape(-1)
        if bits:
            packed_bits[start:stop] = bitpack.pack((left >> (8 * lanes)).astype(np.uint8), bits)
    found = {"payload.codes": codes, "payload.escapes": np.concatenate(escapes), "tables.base": base}
    return found | ({"payload.rest": rest} if lanes else {}) | ({"payload.bits": packed_bits} if bits else {})


def _decode(parts: dict[str, NDArray[np.uint8]], fmt: FloatFormat, window: Window, out: NDArray[Any]) -> None:
    """Write the words back into flat `out`; FormatError if the list of escapes is too short or too long."""
    fast = _compiled(fmt, window)
    if fast is not None:
        if not fast.decode(*(parts[name] for name in COMPILED), window, out):
            raise FormatError(f"lossless chunk holds {parts['payload.escapes'].size} escapes, its codes name others")
        return
    grid = out.reshape(window.outer * window.tables, window.rows * window.period)
    lanes, bits = divmod(fmt.rest_bits, 8)
    codes, base, escapes = parts["payload.codes"], parts["tables.base"], parts["payload.escapes"]
    taken = 0
    scratch = None
    for start, stop in window.batches(BATCH):
        if scratch is None:  # later batches are never larger
            scratch = np.empty((stop - start, 8, codes.shape[2]), np.uint8)
            joined = np.empty((stop - start) * grid.shape[1], fmt.word)
        code = bitpack.unpack(codes[start:stop], grid.shape[1], 3, scratch)
        shaped = code.reshape(-1, window.rows, window.period)
        exponent = np.add(shaped, window.bases_of(base, start, stop))
        where = np.flatnonzero(shaped == ESCAPE)
        if taken + where.size > escapes.size:
            raise FormatError(f"lossless chunk holds {escapes.size} escapes, its codes name more")
        exponent.reshape(-1)[where] = escapes[taken : taken + where.size]
        taken += where.size
        flat = slice(start * grid.shape[1], stop * grid.shape[1])
        left = joined[: flat.stop - flat.start]
        if bits:
            np.copyto(left, bitpack.unpack(parts["payload.bits"][start:stop], grid.shape[1], bits).reshape(-1))
        for lane in reversed(range(lanes)):
            if bits or lane != lanes - 1:
                left <<= 8
                left |= parts["payload.rest"][lane, flat]
            else:
                np.copyto(left, parts["payload.rest"][lane, flat])
        fmt.join(exponent.reshape(-1), left, out[flat])
    if taken != escapes.size:
        raise FormatError(f"lossless chunk holds {escapes.size} escapes, its codes name {taken}")


def _compiled(fmt: FloatFormat, window: Window) -> Any:
    """The module that codes such words faster, if there is one."""
    if fmt is not FORMATS["bfloat16"] or window.period < LEAST_PERIOD:
        return None
    return _fast()


@cache
def _fast() -> Any:
    try:
        from kvlab.serde import rans_fast  # noqa: F401, I001  # makes numba's library fit to live beside an engine
        from kvlab.serde import lossless_fast
    except ImportError:  # numba is an extra; the same bytes are written and read without it
        return None
    return lossless_fast


def _checked(
    encoded: Encoded, parts: dict[str, NDArray[np.uint8]], num_bytes: int
) -> tuple[FloatFormat | None, Window | None]:
    """Format and window of a chunk whose parts have the sizes that shape and params ask for, or FormatError."""
    coding, element, rows, period = (encoded.params.get(key) for key in ("coding", "element", "rows", "period"))
    if coding == "raw":
        expected: dict[str, tuple[int, ...]] = {"payload.rest": (num_bytes,)}
        fmt, window = None, None
    else:
        fmt = FORMATS.get(element) if isinstance(element, str) else None
        if coding != "window" or fmt is None or num_bytes % fmt.item_bytes:
            raise FormatError(
                f"lossless coding must be raw, or window of a known element; got {str(encoded.params)[:120]}"
            )
        if type(rows) is not int or type(period) is not int:
            raise FormatError(f"lossless rows and period must be integers, got {str((rows, period))[:80]}")
        window = Window.of(encoded.shape, encoded.axes, num_bytes // fmt.item_bytes, rows, period)
        grid = (window.outer * window.tables, window.rows * window.period)
        lanes, bits = divmod(fmt.rest_bits, 8)
        expected = {"payload.codes": bitpack.packed_shape(*grid, 3), "tables.base": (window.tables, window.period)}
        expected |= {"payload.rest": (lanes, num_bytes // fmt.item_bytes)} if lanes else {}
        expected |= {"payload.bits": bitpack.packed_shape(*grid, bits)} if bits else {}
    for name, shape in expected.items():
        if name not in parts or parts[name].shape != shape:
            found = parts[name].shape if name in parts else "nothing"
            raise FormatError(f"part {name!r} of lossless must have shape {list(shape)}, got {found}")
    if window is not None and ("payload.escapes" not in parts or parts["payload.escapes"].ndim != 1):
        raise FormatError("a lossless chunk needs its list of escapes")
    return fmt, window
