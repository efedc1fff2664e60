"""Scaled 8- and 4-bit numbers: `fp8`, `int8`, `int4`.

Each group of elements shares a scale. A *token* group lies along head_dim: one token's head, or a piece of it. A
*channel* group lies along tokens: one channel of a head over `group` tokens, or over the whole chunk. Keys have
outlier channels, so K quantizes better by channel; values do not (KIVI, arXiv 2402.02750). K and V choose apart:
``int8:k=channel,v=token``, ``int4:group=64``.

Scales are bf16, because it has the range of every KV dtype; the encoder quantizes with the rounded scale, so that
its precision costs nothing. A group of zeros has scale 0 and comes back as zeros.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.serde.base import Encoded, Serde, checked_out
from kvlab.serde.groups import MODES, checked_axes, halves, need_kv_axes

BATCH = 1 << 18  # elements
MAX_GROUP = 1 << 20  # elements

Parts = Mapping[str, torch.Tensor]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class ScaledSerde(Serde):
    """What the scaled kinds share: how K and V are cut into groups. A kind says how one group becomes codes."""

    needs_kv_axes = True
    takes_latents = True
    default_modes: ClassVar[tuple[str, str]] = ("token", "token")

    def __init__(self, k: str | None = None, v: str | None = None, group: str | int = 0) -> None:
        self.modes = (k or self.default_modes[0], v or self.default_modes[1])
        if not set(self.modes) <= set(MODES):
            raise ConfigError(f"k and v must be token or channel, got k={self.modes[0]!r}, v={self.modes[1]!r}")
        digits = str(group)
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 7) or int(digits) > MAX_GROUP:
            raise ConfigError(f"group must be a number of elements, or 0 for the whole axis; got {digits[:40]!r}")
        self.group = int(digits)

    @property
    def spec(self) -> str:
        return f"{self.name}:k={self.modes[0]},v={self.modes[1]},group={self.group}"

    @abstractmethod
    def quantize(self, values: torch.Tensor, dim: int) -> Parts:
        """Codes and scales of float32 `values`, whose axis `dim` lies inside a group: ``payload``, ``scales``..."""

    @abstractmethod
    def dequantize(self, parts: Parts, largest: float, out: torch.Tensor) -> None:
        """Write a few layers' values into `out`, of the KV's dtype, strided. No scale is above `largest`."""

    @abstractmethod
    def part_shapes(self, values: torch.Size, dim: int) -> Shapes:
        """Dtype and shape of each part that `quantize` makes of values of this shape."""

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        need_kv_axes(self.name, kv, axes, latents=True)
        host = kv.detach().cpu()
        parts: dict[str, torch.Tensor] = {}
        for piece in halves(host, axes, self.modes, self.group):
            for name, part in self.quantize(piece.values.float(), piece.dim).items():
                parts[f"{name}.{piece.name}"] = part.contiguous()
        params = {"k": self.modes[0], "v": self.modes[1], "group": self.group}
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, parts, params)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        modes, group = _params(encoded)
        checked_axes(encoded.shape, encoded.axes, encoded.dtype, latents=True)
        # A tensor without memory has the shapes to check the parts against, before any memory is taken.
        for piece in halves(torch.empty(encoded.shape, device="meta"), encoded.axes, modes, group):
            shapes = self.part_shapes(piece.values.shape, piece.dim)
            checked_parts(self.name, encoded, {f"{name}.{piece.name}": shape for name, shape in shapes.items()})
        result = checked_out(encoded, out)
        target = result if result.device.type == "cpu" else torch.empty(encoded.shape, dtype=result.dtype)
        for piece in halves(target, encoded.axes, modes, group):
            names = self.part_shapes(piece.values.shape, piece.dim)
            parts = {name: encoded.parts[f"{name}.{piece.name}"] for name in names}
            if not piece.values.numel():
                continue
            largest = float(parts["scales"].amax())
            # A few layers at a time: few calls, and what they make in between stays in a core's cache.
            step = max(1, BATCH * len(piece.values) // piece.values.numel())
            for start in range(0, len(piece.values), step):
                batch = slice(start, start + step)
                self.dequantize({name: part[batch] for name, part in parts.items()}, largest, piece.values[batch])
        return result if target is result else result.copy_(target)


class Int8Serde(ScaledSerde):
    """8-bit integers -127..127, a symmetric scale per group; per token and head unless told otherwise."""

    name = "int8"

    def quantize(self, values: torch.Tensor, dim: int) -> Parts:
        scales, inverse = symmetric_scales(values, dim, 127.0)
        return {"payload": values.mul(inverse).round_().clamp_(-127, 127).to(torch.int8), "scales": scales}

    def dequantize(self, parts: Parts, largest: float, out: torch.Tensor) -> None:
        wide = torch.float32 if out.dtype != torch.bfloat16 else torch.bfloat16
        scaled(parts["payload"].to(wide), parts["scales"], 127.0 * largest, out)

    def part_shapes(self, values: torch.Size, dim: int) -> Shapes:
        return {"payload": (torch.int8, tuple(values)), "scales": (torch.bfloat16, one_of(values, dim))}


class Fp8Serde(ScaledSerde):
    """8-bit floats (e4m3), scaled so that a group's largest becomes 448 and nothing overflows to NaN."""

    name = "fp8"

    def quantize(self, values: torch.Tensor, dim: int) -> Parts:
        scales, inverse = symmetric_scales(values, dim, 448.0)
        return {"payload": values.mul(inverse).clamp_(-448, 448).to(torch.float8_e4m3fn), "scales": scales}

    def dequantize(self, parts: Parts, largest: float, out: torch.Tensor) -> None:
        # torch converts fp8 one by one. As bits it is quick: sign and fields moved to bf16's places make a bf16
        # number 2**120 too small (the biases differ: 127 - 7), which the scale makes good where it has room.
        scales = parts["scales"]
        if out.dtype != torch.bfloat16 or largest > 64:
            scaled(parts["payload"].float(), scales, 448.0 * largest, out)
            return
        bits = parts["payload"].view(torch.int8).to(torch.int16)
        bits <<= 4  # the sign was extended over the upper byte, so it stands in bit 15 again
        bits &= -0x7810  # 0x87F0: sign, four exponent bits, three mantissa bits
        torch.mul(bits.view(torch.bfloat16), (scales.float() * 2.0**120).to(torch.bfloat16), out=out)

    def part_shapes(self, values: torch.Size, dim: int) -> Shapes:
        return {"payload": (torch.float8_e4m3fn, tuple(values)), "scales": (torch.bfloat16, one_of(values, dim))}


class Int4Serde(ScaledSerde):
    """4-bit integers 0..15 from a group's smallest to its largest; K by channel, V by token, groups of 64."""

    name = "int4"
    default_modes = ("channel", "token")

    def __init__(self, k: str | None = None, v: str | None = None, group: str | int = 64) -> None:
        super().__init__(k, v, group)

    def quantize(self, values: torch.Tensor, dim: int) -> Parts:
        limit = torch.finfo(torch.bfloat16).max
        # -0.0 is made 0.0: which of them a minimum gives depends on the machine.
        low = finite(values.amin(dim, keepdim=True)).clamp_(-limit, limit).to(torch.bfloat16).add_(0.0)
        high = finite(values.amax(dim, keepdim=True))
        step = (high / 15 - low.float() / 15).clamp_(0, limit).to(torch.bfloat16).add_(0.0)
        small = away_from_the_end(high, low)
        inverse = torch.where(step > 0, 1 / (step.float() * small), 0.0).clamp_(0, limit)
        values = values if small == 1 else values * small
        codes = values.sub(low.float() * small).mul_(inverse).round_().clamp_(0, 15).to(torch.uint8)
        return {"payload": nibbles(codes), "scales": step, "scales_low": low}

    def dequantize(self, parts: Parts, largest: float, out: torch.Tensor) -> None:
        codes = from_nibbles(parts["payload"], out.shape[-1])
        small = away_from_the_end(torch.tensor(largest))
        limit = torch.finfo(out.dtype).max * small
        wide = codes.float().mul_(parts["scales"].float() * small).add_(parts["scales_low"].float() * small)
        out.copy_(wide.clamp_(-limit, limit).div_(small))

    def part_shapes(self, values: torch.Size, dim: int) -> Shapes:
        scales = (torch.bfloat16, one_of(values, dim))
        payload = (*values[:-1], -(-values[-1] // 2))
        return {"payload": (torch.uint8, payload), "scales": scales, "scales_low": scales}


def symmetric_scales(values: torch.Tensor, dim: int, largest_code: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 scales that map a group's largest magnitude to `largest_code`, and their inverses in float32."""
    top = finite(values.abs().amax(dim, keepdim=True))
    scales = (top / largest_code).to(torch.bfloat16)
    inverse = 1 / scales.float()
    return scales, torch.where(torch.isfinite(inverse), inverse, 0.0)


def scaled(codes: torch.Tensor, scales: torch.Tensor, largest: float, out: torch.Tensor) -> None:
    """``out = codes * scales``; a product that the rounding of its scale pushed over the dtype's end is its end.

    `largest` bounds the products. A hostile scale (NaN, negative) gives odd numbers and harms nothing else.
    """
    limit = torch.finfo(out.dtype).max
    if largest < limit:
        torch.mul(codes, scales, out=out)
    else:
        out.copy_((codes.float() * scales.float()).clamp_(-limit, limit))


def away_from_the_end(*tops: torch.Tensor) -> float:
    """A power of two by which float32 numbers of such magnitudes can be multiplied, so that sums of a thousand of them
    stay finite. 1 where they do anyway: nothing is rounded otherwise then."""
    return 2.0**-16 if any(top.numel() and float(top.abs().amax()) > 2.0**100 for top in tops) else 1.0


def finite(tops: torch.Tensor) -> torch.Tensor:
    """`tops`, or ConfigError where one is NaN or infinite: a lossy kind could not keep it and would hide it."""
    if not bool(torch.isfinite(tops).all()):
        raise ConfigError("KV holds NaN or infinity, which scaled kinds cannot keep; use lossless to look at it")
    return tops


def one_of(values: torch.Size, dim: int) -> tuple[int, ...]:
    """Shape of one number per group."""
    shape = list(values)
    shape[dim] = 1
    return tuple(shape)


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 (..., n) as bytes (..., ceil(n/2)): the first half low, the second high, as `bitpack` does."""
    run = -(-codes.shape[-1] // 2)
    high = torch.nn.functional.pad(codes[..., run:], (0, 2 * run - codes.shape[-1]))
    return codes[..., :run] | (high << 4)


def from_nibbles(packed: torch.Tensor, length: int) -> torch.Tensor:
    """The codes (..., length) that `nibbles` packed."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., :length]


def checked_parts(serde: str, encoded: Encoded, shapes: Shapes) -> None:
    """FormatError unless `encoded` has every part of `shapes`, with that dtype and shape."""
    for name, (dtype, shape) in shapes.items():
        part = encoded.parts.get(name)
        if part is None or part.dtype != dtype or tuple(part.shape) != shape:
            found = "nothing" if part is None else f"{part.dtype}{list(part.shape)}"
            raise FormatError(f"{serde} part {name!r} must be {dtype}{list(shape)}, got {found}")


def _params(encoded: Encoded) -> tuple[tuple[str, str], int]:
    k, v, group = (encoded.params.get(key) for key in ("k", "v", "group"))
    if k not in MODES or v not in MODES or type(group) is not int or not 0 <= group <= MAX_GROUP:
        raise FormatError(f"scaled KV needs modes for k and v and a group, got {str(encoded.params)[:120]}")
    return (k, v), group
