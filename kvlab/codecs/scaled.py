"""`int8`, `fp8` and `int4` on the device where the pages lie: one launch for each run of equal groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kvlab.codecs import scaled_triton as kernels
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.launch import Launch
from kvlab.codecs.plan import Plan, num_tokens_of, scaled_plan
from kvlab.errors import ConfigError
from kvlab.serde.base import Encoded
from kvlab.serde.quantized import ScaledSerde

TILE = 2048  # elements that a program works on at once
MAX_TOKENS = 32  # of a tile


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
        self._plans: dict[int, Plan] = {}
        self._made: dict[tuple[str, int, int, int], list[Launch]] = {}
        self._constants = (
            kernels.KINDS[serde.name], kernels.FLOATS[self.dtype], kernels.WORDS[self.dtype],
        )  # fmt: skip

    def plan(self, num_tokens: int) -> Plan:
        """The parts of an object of so many tokens."""
        if num_tokens not in self._plans:
            shape = self._map.shape(self._at.num_layers, num_tokens)
            self._plans[num_tokens] = scaled_plan(self.serde, shape, self.dtype)
        return self._plans[num_tokens]

    def check(self, encoded: Encoded) -> None:
        """FormatError unless the object is one of this codec's, with the parts of `plan`."""
        self.plan(num_tokens_of(encoded)).check(encoded)

    def encode(
        self, objects: Sequence[Sequence[int]], num_tokens: int, buffer: torch.Tensor, flags: torch.Tensor
    ) -> None:
        """Pages of objects of so many tokens each, given as their block ids, into `buffer`, uint8 on their device: one
        `plan` after the other. ``flags[object, 0]`` becomes 1 where a number is NaN or infinite: then it is no
        object."""
        each = self.plan(num_tokens).num_bytes
        ids = self._at.ids(objects)
        for launch in self._launches("encode", num_tokens, len(objects[0]), each):
            launch(ids, len(objects), buffer, flags, None)

    def decode(self, buffer: torch.Tensor, objects: Sequence[Sequence[int]], num_tokens: int) -> None:
        """What `encode` made, into pages; every byte that is none of the tokens' stays."""
        each = self.plan(num_tokens).num_bytes
        ids = self._at.ids(objects)
        for launch in self._launches("decode", num_tokens, len(objects[0]), each):
            launch(ids, len(objects), buffer, None, None)

    def encode_blocks(
        self,
        ids: torch.Tensor,
        count: int,
        num_tokens: int,
        buffer: torch.Tensor,
        flags: torch.Tensor,
        *,
        each: int,
        stream: int | None,
    ) -> None:
        """`encode` for the first `count` of `ids`, int32 on the device and not checked: each block is an object of its
        own, one in `each` bytes, a multiple of 256. `stream`: the handle of the current one."""
        for launch in self._launches("encode", num_tokens, 1, each):
            launch(ids, count, buffer, flags, stream)

    def decode_blocks(
        self, ids: torch.Tensor, count: int, num_tokens: int, buffer: torch.Tensor, *, each: int, stream: int | None
    ) -> None:
        """What `encode_blocks` made, into pages."""
        for launch in self._launches("decode", num_tokens, 1, each):
            launch(ids, count, buffer, None, stream)

    def _launches(self, what: str, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        key = (what, num_tokens, object_blocks, each)
        if key not in self._made:
            make = self._encoding if what == "encode" else self._decoding
            self._made[key] = [make(run, num_tokens, object_blocks, each) for run in self._runs(num_tokens)]
        return self._made[key]

    def _encoding(self, run: Run, num_tokens: int, object_blocks: int, each: int) -> Launch:
        item, layers, tables = self._map, self._at.num_layers, self._at.planes[run.plane]
        about = (layers, object_blocks, each, self._at.block_stride, item.block_tokens)
        tail = (*self._constants, tables.stride, tables.align)
        if run.by_channel:
            width = self._width(item.head_dim)
            tokens, channels = _tile(width, 64)
            program, grid = kernels._encode_by_channel, (run.num_groups, item.kv_heads, triton.cdiv(width, channels))
            sizes: tuple[int, ...] = (run.num_groups, run.group, run.first, item.kv_heads, item.head_dim, width)
        else:
            width = self._width(run.group)
            tokens, channels = _tile(width, 1024)
            program = kernels._encode_by_token
            grid = (triton.cdiv(num_tokens, tokens), item.kv_heads * run.num_groups, 1)
            sizes = (num_tokens, 0, item.kv_heads, run.first, run.num_groups, run.group, width)
        rest = (*about, *sizes, *tail, tokens, channels)
        return self._launch(program, grid, run, num_tokens, rest)

    def _decoding(self, run: Run, num_tokens: int, object_blocks: int, each: int) -> Launch:
        item, layers, tables = self._map, self._at.num_layers, self._at.planes[run.plane]
        about = (layers, object_blocks, each, self._at.block_stride, item.block_tokens)
        wide = item.head_dim if run.by_channel else run.group
        width = self._width(wide)
        count = run.num_groups * run.group if run.by_channel else num_tokens
        tokens, channels = _tile(width, 128 if run.by_channel else 1024)
        pieces = 1 if run.by_channel else run.num_groups
        first_token, first_channel = (run.first, 0) if run.by_channel else (0, run.first)
        grid = (triton.cdiv(count, tokens), item.kv_heads * pieces, triton.cdiv(width, channels))
        rest = (
            *about, count, first_token, item.kv_heads, first_channel, run.num_groups, run.group, wide, width,
            *self._constants, tables.stride, tables.align, tokens, channels, run.by_channel,
            float(torch.finfo(item.element).max),
        )  # fmt: skip
        return self._launch(kernels._decode, grid, run, num_tokens, rest)

    def _launch(
        self, program: Any, grid: tuple[int, int, int], run: Run, num_tokens: int, rest: Sequence[Any]
    ) -> Launch:
        """`grid` is of one layer."""
        tables, parts = self._at.planes[run.plane], self.plan(num_tokens).parts
        payload, scales = parts[f"payload.{run.name}"], parts[f"scales.{run.name}"]
        low = parts.get(f"scales_low.{run.name}", scales)
        return Launch(
            program,
            (self._at.num_layers * grid[0], *grid[1:]),
            (self._at.pointers, tables.tokens, tables.heads, tables.channels),
            ((payload.start, torch.int8), (scales.start, torch.int16), (low.start, torch.int16)),  # bits, as ints
            rest,
        )

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


def _tile(width: int, most: int) -> tuple[int, int]:
    """Tokens and channels of a program's tile, powers of two. The same for objects of any length: another tile would be
    another program, to be compiled in the middle of serving."""
    channels = min(triton.next_power_of_2(max(width, 1)), most)
    return max(1, min(MAX_TOKENS, TILE // channels)), channels
