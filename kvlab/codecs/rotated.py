"""`rotated4` on the device where the pages lie: one launch for each plane."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton

from kvlab.codecs import rotated_triton as kernels
from kvlab.codecs.fixed import FixedCodec
from kvlab.codecs.launch import Launch
from kvlab.codecs.scaled_triton import FLOATS, WORDS
from kvlab.serde.rotated import Rotated4Serde, block_of

TILE = 2048  # elements that a program works on at once
MAX_TOKENS = 32  # of a tile


class RotatedCodec(FixedCodec[Rotated4Serde]):
    """See `FixedCodec`."""

    def _encodings(self, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        return list(self._made_of(kernels._encode, num_tokens, object_blocks, each))

    def _decodings(self, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        largest = float(torch.finfo(self._map.element).max)
        return list(self._made_of(kernels._decode, num_tokens, object_blocks, each, largest))

    def _made_of(self, program: Any, num_tokens: int, object_blocks: int, each: int, *last: float) -> Iterator[Launch]:
        item, parts = self._map, self.plan(num_tokens).parts
        dim, block = item.head_dim, block_of(item.head_dim)
        channels = triton.next_power_of_2(dim)
        tokens = max(1, min(MAX_TOKENS, TILE // channels))
        root = float(torch.tensor(1 / math.sqrt(block)))  # as float32 has it
        for plane, tables in enumerate(self._at.planes):
            yield Launch(
                program,
                (self._at.num_layers * triton.cdiv(num_tokens, tokens), item.kv_heads, 1),
                (self._at.pointers, tables.tokens, tables.heads, tables.channels),
                ((parts["payload"].start, torch.int8), (parts["scales"].start, torch.int16)),
                (
                    self._at.num_layers, object_blocks, each, self._at.block_stride, item.block_tokens,
                    num_tokens, item.kv_heads, plane, len(self._at.planes), dim, -(-dim // 2),
                    root, block, FLOATS[self.dtype], WORDS[self.dtype], tables.stride, tables.align, tokens, channels,
                    *last,
                ),
            )  # fmt: skip
