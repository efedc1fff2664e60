"""`int8`, `fp8` and `int4` on the device where the pages lie: one launch for each run of equal groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kvlab.codecs import scaled_triton as kernels
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.fixed import FixedCodec
from kvlab.codecs.launch import Launch
from kvlab.errors import ConfigError
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


class ScaledCodec(FixedCodec[ScaledSerde]):
    """`int8`, `fp8` and `int4`."""

    def __init__(self, serde: ScaledSerde, addresses: Addresses) -> None:
        if serde.name not in kernels.KINDS:
            raise ConfigError(f"no GPU program codes {serde.name!r}; there are {', '.join(kernels.KINDS)} and lossless")
        super().__init__(serde, addresses)
        self._constants = (
            kernels.KINDS[serde.name], kernels.FLOATS[self.dtype], kernels.WORDS[self.dtype],
        )  # fmt: skip

    def _encodings(self, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        return [self._encoding(run, num_tokens, object_blocks, each) for run in self._runs(num_tokens)]

    def _decodings(self, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        return [self._decoding(run, num_tokens, object_blocks, each) for run in self._runs(num_tokens)]

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
