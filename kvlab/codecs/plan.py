"""Where the parts of an encoded object lie in one run of bytes: in a buffer of a GPU, and in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from kvlab.errors import FormatError
from kvlab.geometry import AXES
from kvlab.serde.base import Encoded
from kvlab.serde.groups import halves
from kvlab.serde.quantized import ScaledSerde

ALIGNMENT = 256  # bytes: of each part's beginning


@dataclass(frozen=True)
class PartAt:
    """A part's dtype and shape, and the byte at which it begins."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """The parts of one object of typed KV of this shape, and all that the object says of itself."""

    serde: str
    shape: tuple[int, ...]
    dtype: str
    params: Mapping[str, Any]
    parts: Mapping[str, PartAt]

    @staticmethod
    def of(
        serde: str,
        shape: tuple[int, ...],
        dtype: str,
        params: Mapping[str, Any],
        parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    ) -> "Plan":
        """The plan of parts with these dtypes and shapes, in this order."""
        placed, at = {}, 0
        for name, (of_part, size) in parts.items():
            placed[name] = PartAt(of_part, size, at)
            at += -(-placed[name].num_bytes // ALIGNMENT) * ALIGNMENT
        return Plan(serde, shape, dtype, params, placed)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts and what lies between them."""
        return max(
            (-(-(part.start + part.num_bytes) // ALIGNMENT) * ALIGNMENT for part in self.parts.values()), default=0
        )

    def shortened(self, name: str, length: int) -> "Plan":
        """The same with so many elements in the last part, whose number is known when all else is done."""
        return replace(self, parts={**self.parts, name: replace(self.parts[name], shape=(length,))})

    def check(self, encoded: Encoded) -> None:
        """FormatError unless `encoded` has exactly these parts, and says of itself what the plan does: an object of
        other options, or of another engine, is the twin's to read."""
        for name in ("serde", "shape", "dtype", "params"):
            found, want = getattr(encoded, name), getattr(self, name)
            if found != want:
                raise FormatError(f"{name} must be {want} here, the object has {found}"[:300], reason="other_options")
        if encoded.axes != AXES:
            raise FormatError(f"axes must be {AXES}, the object has {encoded.axes}"[:300], reason="wrong_axes")
        for name, at in self.parts.items():
            part = encoded.parts.get(name)
            if part is None or part.dtype != at.dtype or tuple(part.shape) != at.shape:
                told = "nothing" if part is None else f"{part.dtype}{list(part.shape)}"
                raise FormatError(f"{self.serde} part {name!r} must be {at.dtype}{list(at.shape)}, got {told}")

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts in `buffer`, uint8."""
        return {
            name: buffer[part.start : part.start + part.num_bytes].view(part.dtype).view(part.shape)
            for name, part in self.parts.items()
        }

    def encoded(self, buffer: torch.Tensor) -> Encoded:
        """The object whose parts lie in `buffer`, uint8 in host memory; it views them."""
        return Encoded(self.serde, self.shape, self.dtype, AXES, self.views(buffer), dict(self.params))


def scaled_plan(serde: ScaledSerde, shape: tuple[int, ...], dtype: str) -> Plan:
    """The parts that a scaled kind makes of typed KV of this shape, whatever it holds."""
    parts = {}
    for piece in halves(torch.empty(shape, device="meta"), AXES, serde.modes, serde.group):
        for name, kind in serde.part_shapes(piece.values.shape, piece.dim).items():
            parts[f"{name}.{piece.name}"] = kind
    params = {"k": serde.modes[0], "v": serde.modes[1], "group": serde.group}
    return Plan.of(serde.name, shape, dtype, params, parts)


def num_tokens_of(encoded: Encoded) -> int:
    """Tokens of typed KV; FormatError where it is none."""
    if len(encoded.shape) != len(AXES):
        raise FormatError(f"typed KV has axes {AXES}, the object has {encoded.axes}"[:300], reason="wrong_axes")
    return encoded.shape[AXES.index("tokens")]
