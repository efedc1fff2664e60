"""Where the parts of an encoded object lie in one run of bytes: in a buffer of a GPU, and in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from kvlab.geometry import AXES
from kvlab.serde.base import Encoded

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

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts in `buffer`, uint8."""
        return {
            name: buffer[part.start : part.start + part.num_bytes].view(part.dtype).view(part.shape)
            for name, part in self.parts.items()
        }

    def encoded(self, buffer: torch.Tensor) -> Encoded:
        """The object whose parts lie in `buffer`, uint8 in host memory; it views them."""
        return Encoded(self.serde, self.shape, self.dtype, AXES, self.views(buffer), dict(self.params))
