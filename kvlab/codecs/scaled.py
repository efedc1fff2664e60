"""`int8`, `fp8` and `int4` on the device where the pages lie: one launch for each run of equal groups."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton

from kvlab.codecs import scaled_triton as kernels
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.plan import Plan, num_tokens_of, scaled_plan
from kvlab.errors import ConfigError
from kvlab.serde.base import Encoded
from kvlab.serde.quantized import ScaledSerde

TILE = 2048  # elements that a program works on at once
MAX_TOKENS = 32  # of a tile
Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """Equal groups of one plane: `num_groups` of `group` elements, from element `first` of the grouped axis on."""

    name: str
    plane: int
    by_channel: bool
    first: int
    num_groups: int
    group: int


class ScaledCodec:
    """Launches over the pages of one KV cache group. Everything is enqueued on the current stream; nothing is waited
    for. Block ids are checked; what they name is not."""

    def __init__(self, serde: ScaledSerde, addresses: Addresses) -> None:
        if serde.name not in kernels.KINDS:
            raise ConfigError(f"no GPU program codes {serde.name!r}; there are {', '.join(kernels.KINDS)} and lossless")
        self.serde, self.name, self._at = serde, serde.spec, addresses
        self.pages, self._map = addresses.pages, addresses.pages.map
        self.dtype = str(self._map.element).removeprefix("torch.")
        if self.dtype not in kernels.FLOATS:
            raise ConfigError(f"serde {serde.spec!r} takes {', '.join(kernels.FLOATS)}, pages hold {self.dtype}")
        self._constants = (
            kernels.KINDS[serde.name], kernels.FLOATS[self.dtype], kernels.WORDS[self.dtype],
        )  # fmt: skip

    def plan(self, num_tokens: int) -> Plan:
        """The parts of an object of so many tokens."""
        return scaled_plan(self.serde, self._map.shape(self._at.num_layers, num_tokens), self.dtype)

    def check(self, encoded: Encoded) -> None:
        """FormatError unless the object is one of this codec's, with the parts of `plan`."""
        self.plan(num_tokens_of(encoded)).check(encoded)

    def encode(
        self,
        objects: Sequence[Sequence[int]],
        num_tokens: int,
        buffer: torch.Tensor,
        flags: torch.Tensor,
        *,
        each: int = 0,
    ) -> None:
        """Pages of objects of so many tokens each, given as their block ids, into `buffer`, uint8 on their device: one
        `plan` after the other, or one in `each` bytes, a multiple of 256. ``flags[object, 0]`` becomes 1 where a number
        is NaN or infinite: then it is no object."""
        plan, ids, item = self.plan(num_tokens), self._at.ids(objects), self._map
        parts, slabs = plan.views(buffer[: plan.num_bytes]), len(objects) * self._at.num_layers
        about = (self._at.num_layers, len(objects[0]), each or plan.num_bytes, self._at.block_stride)
        for run in self._runs(num_tokens):
            payload, scales, low = _operands(parts, run.name)
            tables = self._at.planes[run.plane]
            places = (self._at.pointers, ids, tables.tokens, tables.heads, tables.channels)
            tail = (*self._constants, tables.stride, tables.align)
            if run.by_channel:
                width = self._width(item.head_dim)
                tokens, channels = _tile(width, 64)
                grid = (slabs * run.num_groups, item.kv_heads, triton.cdiv(width, channels))
                kernels._encode_by_channel[grid](
                    *places, payload, scales, low, flags, *about, item.block_tokens, run.num_groups,
                    run.group, run.first, item.kv_heads, item.head_dim, width, *tail, tokens, channels,
                    enable_fp_fusion=False,
                )  # fmt: skip
            else:
                tokens, channels = _tile(self._width(run.group), 1024)
                tokens_grid = (slabs * triton.cdiv(num_tokens, tokens), item.kv_heads * run.num_groups)
                kernels._encode_by_token[tokens_grid](
                    *places, payload, scales, low, flags, *about, item.block_tokens, num_tokens, 0,
                    item.kv_heads, run.first, run.num_groups, run.group, self._width(run.group), *tail, tokens,
                    channels, enable_fp_fusion=False,
                )  # fmt: skip

    def decode(self, buffer: torch.Tensor, objects: Sequence[Sequence[int]], num_tokens: int, *, each: int = 0) -> None:
        """What `encode` made, into pages; every byte that is none of the tokens' stays."""
        plan, ids, item = self.plan(num_tokens), self._at.ids(objects), self._map
        parts, slabs = plan.views(buffer[: plan.num_bytes]), len(objects) * self._at.num_layers
        about = (self._at.num_layers, len(objects[0]), each or plan.num_bytes, self._at.block_stride)
        largest = float(torch.finfo(item.element).max)
        for run in self._runs(num_tokens):
            payload, scales, low = _operands(parts, run.name)
            tables = self._at.planes[run.plane]
            wide = item.head_dim if run.by_channel else run.group
            width = self._width(wide)
            count = run.num_groups * run.group if run.by_channel else num_tokens
            tokens, channels = _tile(width, 128 if run.by_channel else 1024)
            pieces = 1 if run.by_channel else run.num_groups
            first_token, first_channel = (run.first, 0) if run.by_channel else (0, run.first)
            grid = (
                slabs * triton.cdiv(count, tokens), item.kv_heads * pieces, triton.cdiv(width, channels),
            )  # fmt: skip
            kernels._decode[grid](
                self._at.pointers, ids, tables.tokens, tables.heads, tables.channels, payload, scales, low,
                *about, item.block_tokens, count, first_token, item.kv_heads, first_channel,
                run.num_groups, run.group, wide, width, *self._constants, tables.stride, tables.align, tokens,
                channels, run.by_channel, largest, enable_fp_fusion=False,
            )  # fmt: skip

    def _runs(self, num_tokens: int) -> Iterator[Run]:
        """The runs of equal groups, named as `halves` does."""
        size = self.serde.group
        for plane, (letter, mode) in enumerate(zip("kv"[: len(self._map.planes)], self.serde.modes, strict=False)):
            length = num_tokens if mode == "channel" else self._map.head_dim
            whole = length - length % min(size or length, length) if length else 0
            for suffix, start, stop in (("", 0, whole), (".tail", whole, length)):
                if stop > start:
                    each = min(size or length, stop - start)
                    yield Run(letter + suffix, plane, mode == "channel", start, (stop - start) // each, each)

    def _width(self, channels: int) -> int:
        """Bytes of so many channels' codes."""
        return -(-channels // 2) if self.serde.name == "int4" else channels


def _operands(parts: Parts, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes as int8, scales and lows as int16: a program works on their bits."""
    payload, scales = parts[f"payload.{name}"], parts[f"scales.{name}"]
    low = parts.get(f"scales_low.{name}", scales)
    return payload.view(torch.int8), scales.view(torch.int16), low.view(torch.int16)


def _tile(width: int, most: int) -> tuple[int, int]:
    """Tokens and channels of a program's tile, powers of two. The same for objects of any length: another tile would be
    another program, to be compiled in the middle of serving."""
    channels = min(triton.next_power_of_2(max(width, 1)), most)
    return max(1, min(MAX_TOKENS, TILE // channels)), channels
