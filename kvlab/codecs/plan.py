"""Where the parts of an encoded object lie in one run of bytes: in a buffer of a GPU, and in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde import rotated
from kvlab.serde.base import Encoded, Serde
from kvlab.serde.centered import CenteredSerde
from kvlab.serde.groups import halves
from kvlab.serde.quantized import ScaledSerde
from kvlab.stated import CODED_KINDS

MEAN, FREQUENCIES = "tables.mean", "tables.frequencies"  # parts of `centered`
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
    """The parts of one object of typed KV of this shape, and all that the object says of itself. `constants`: parts
    that are the same in all objects, and lie in no buffer."""

    serde: str
    shape: tuple[int, ...]
    dtype: str
    params: Mapping[str, Any]
    parts: Mapping[str, PartAt]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

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
        for name, value in self.constants.items():
            part = encoded.parts.get(name)
            if part is None or part.dtype != value.dtype or not part.equal(value):
                raise FormatError(f"{self.serde} part {name!r} is not this codec's", reason="other_options")

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts in `buffer`, uint8."""
        return {
            name: buffer[part.start : part.start + part.num_bytes].view(part.dtype).view(part.shape)
            for name, part in self.parts.items()
        }

    def encoded(self, buffer: torch.Tensor) -> Encoded:
        """The object whose parts lie in `buffer`, uint8 in host memory; it views them."""
        parts = {**self.views(buffer), **self.constants}
        return Encoded(self.serde, self.shape, self.dtype, AXES, parts, dict(self.params))


def fixed_plan(serde: Serde, shape: tuple[int, ...], dtype: str) -> Plan:
    """The parts that `serde` makes of typed KV of this shape, whatever it holds. ConfigError where that depends on what
    it holds, or it codes no such KV."""
    if isinstance(serde, ScaledSerde):
        return _scaled_plan(serde, shape, dtype)
    if isinstance(serde, rotated.Rotated4Serde):
        if shape[-1] > rotated.MAX_HEAD_DIM:
            raise ConfigError(f"rotated4 takes a head_dim of up to {rotated.MAX_HEAD_DIM}, got {shape[-1]}; use int4")
        return Plan.of(serde.name, shape, dtype, {}, rotated.part_shapes(shape, AXES.index("head_dim")))
    if isinstance(serde, CenteredSerde):
        inner = _scaled_plan(serde.inner, shape, "float32")
        layers, _, heads, _, dim = shape
        kinds = {name: (part.dtype, part.shape) for name, part in inner.parts.items()}
        params = {"bits": serde.bits, "style": serde.style, **inner.params}
        plan = Plan.of(serde.name, shape, dtype, params, {**kinds, MEAN: (torch.float32, (layers, heads, dim))})
        return replace(plan, constants={FREQUENCIES: serde.frequencies(dim)})
    raise no_fixed_size(serde)


def no_fixed_size(serde: Serde) -> ConfigError:
    """What to do with a kind whose objects have a size that is known once they are made."""
    return ConfigError(
        f"serde {serde.spec!r} has no fixed size, which slots of host memory need; use {', '.join(CODED_KINDS)} there, "
        "or this one at secondary tiers alone"
    )


def _scaled_plan(serde: ScaledSerde, shape: tuple[int, ...], dtype: str) -> Plan:
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
