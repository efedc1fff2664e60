"""`centered` on the device where the pages lie, block by block.

What is left of a few blocks once the known is taken away lies in room of its own as float32, and the programs of `int4`
or `int8` code it there. So no program of theirs is made twice; the room is bounded, and there is one for each stream.
"""

from typing import Any

import torch
import triton

from kvlab.codecs import centered_triton as kernels
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.launch import Launch
from kvlab.codecs.plan import MEAN, Plan, fixed_plan
from kvlab.codecs.scaled import ScaledCodec
from kvlab.codecs.scaled_triton import FLOATS, WORDS
from kvlab.errors import ConfigError
from kvlab.paged import PageMap, TypedPages, page_layout
from kvlab.paged.known import KNOWN
from kvlab.serde.centered import CenteredSerde, turns

TILE = 2048  # elements that a program works on at once
ROOM_BYTES = 16 << 20  # GPU memory of a room, or one block if that is more


class CenteredCodec:
    """As `FixedCodec`, for blocks alone: a block is turned by its own tokens' places."""

    def __init__(self, serde: CenteredSerde, addresses: Addresses) -> None:
        self.serde, self._at = serde, addresses
        self._map, layers = addresses.pages.map, addresses.num_layers
        self.dtype = str(self._map.element).removeprefix("torch.")
        if self.dtype not in FLOATS:
            raise ConfigError(f"serde {serde.spec!r} takes {', '.join(FLOATS)}, pages hold {self.dtype}")
        self._room_map = _plain(self._map)
        self._room_blocks = max(1, ROOM_BYTES // (layers * self._room_map.page_bytes))
        self._rooms: dict[int, _Room] = {}
        self._plans: dict[int, Plan] = {}
        dim, frequencies = self._map.head_dim, serde.frequencies(self._map.head_dim)
        first, second = _pairs(dim, len(frequencies), serde.style)
        # Channels that do not turn stay: a turn by nothing.
        still = torch.zeros(len(first) - len(frequencies), dtype=torch.float32)
        cosines, sines = turns(self._map.block_tokens, torch.cat([frequencies, still]), 1.0)
        self._num_pairs = len(first)
        self._first, self._second = (addresses.table(each, torch.int32) for each in (first, second))
        self._turns = tuple(each.contiguous().to(addresses.device) for each in (cosines, sines))

    def plan(self, num_tokens: int) -> Plan:
        """The parts of a block of so many tokens."""
        if num_tokens not in self._plans:
            shape = self._map.shape(self._at.num_layers, num_tokens)
            self._plans[num_tokens] = fixed_plan(self.serde, shape, self.dtype)
        return self._plans[num_tokens]

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
        """As `FixedCodec.encode_blocks`."""
        room = self._room(stream)
        for at in range(0, count, self._room_blocks):
            some, there = min(self._room_blocks, count - at), buffer[at:]
            for launch in room.launches("encode", num_tokens, each):
                launch(ids[at:], some, there, None, stream)
            room.codec.encode_blocks(room.ids, some, num_tokens, there, flags[at:], each=each, stream=stream)

    def decode_blocks(
        self, ids: torch.Tensor, count: int, num_tokens: int, buffer: torch.Tensor, *, each: int, stream: int | None
    ) -> None:
        """As `FixedCodec.decode_blocks`."""
        room = self._room(stream)
        for at in range(0, count, self._room_blocks):
            some, there = min(self._room_blocks, count - at), buffer[at:]
            room.codec.decode_blocks(room.ids, some, num_tokens, there, each=each, stream=stream)
            for launch in room.launches("decode", num_tokens, each):
                launch(ids[at:], some, there, None, stream)

    def _room(self, stream: int | None) -> "_Room":
        if (key := stream or 0) not in self._rooms:
            self._rooms[key] = _Room(self, self._room_map, self._room_blocks)
        return self._rooms[key]

    def launches(self, what: str, num_tokens: int, each: int, room: torch.Tensor) -> list[Launch]:
        """Programs between pages and `room`, for blocks of so many tokens whose bytes lie `each` apart."""
        item, layers, is_encode = self._map, self._at.num_layers, what == "encode"
        tokens = triton.next_power_of_2(item.block_tokens)
        pairs = min(triton.next_power_of_2(self._num_pairs), max(1, TILE // tokens))
        channels = triton.next_power_of_2(item.head_dim)
        few = max(1, min(tokens, TILE // channels))
        key, value = self._at.planes
        sizes = (self._at.block_stride, item.block_tokens, num_tokens, item.kv_heads, item.head_dim)
        words = (FLOATS[self.dtype], WORDS[self.dtype])
        ends = () if is_encode else (float(torch.finfo(item.element).max),)
        program: Any = kernels._centre if is_encode else kernels._restore
        keys = Launch(
            program,
            (layers, item.kv_heads, triton.cdiv(self._num_pairs, pairs)),
            (self._at.pointers, key.tokens, key.heads, key.channels, self._first, self._second, *self._turns, room),
            ((self.plan(num_tokens).parts[MEAN].start, torch.float32),),
            (layers, each, *sizes, self._num_pairs, *words, key.stride, key.align, tokens, pairs, *ends),
        )
        program = kernels._values if is_encode else kernels._restore_values
        values = Launch(
            program,
            (layers, item.kv_heads, triton.cdiv(num_tokens, few)),
            (self._at.pointers, value.tokens, value.heads, value.channels, room),
            (),
            (layers, *sizes, *words, value.stride, value.align, few, channels, *ends),
        )
        return [keys, values]


class _Room:
    """float32 of a few blocks, as an engine of its own would hold it, and the codec of what lies there."""

    def __init__(self, of: CenteredCodec, page_map: PageMap, num_blocks: int) -> None:
        layers, device = of._at.num_layers, of._at.device
        # (blocks, layers, page_bytes): a layer's pages are a view of it, a block's layers lie together.
        self.memory = torch.empty((num_blocks, layers, page_map.page_bytes // 4), dtype=torch.float32, device=device)
        caches = {f"layer.{at}": self.memory[:, at] for at in range(layers)}
        sizes = dict.fromkeys(caches, page_map.page_bytes)
        layout = page_layout(caches, num_blocks=num_blocks, page_bytes=sizes, name="BLNHC")
        self.codec = ScaledCodec(of.serde.inner, Addresses(TypedPages(layout, page_map, layers)))
        self.ids = torch.arange(num_blocks, dtype=torch.int32, device=device)
        self._of = of
        self._made: dict[tuple[str, int, int], list[Launch]] = {}

    def launches(self, what: str, num_tokens: int, each: int) -> list[Launch]:
        key = (what, num_tokens, each)
        if key not in self._made:
            self._made[key] = self._of.launches(what, num_tokens, each, self.memory)
        return self._made[key]


def _plain(page_map: PageMap) -> PageMap:
    """Of the same block as float32: tokens, heads, K before V, channels."""
    size = page_map.block_tokens * page_map.kv_heads * 2 * page_map.head_dim * 4
    sizes = {"tokens": page_map.block_tokens, "heads": page_map.kv_heads, "kv": 2, "channels": page_map.head_dim}
    planes = (KNOWN["NHC"].plane(kv, sizes, 4) for kv in range(2))
    return PageMap("NHC", torch.float32, size, tuple(plane for plane in planes if plane is not None))


def _pairs(dim: int, num_turning: int, style: str) -> tuple[list[int], list[int]]:
    """The two channels of each pair, those that turn first; the second is `dim` where one is left alone."""
    turning = range(num_turning)
    pairs = [(at, at + num_turning) if style == "half" else (2 * at, 2 * at + 1) for at in turning]
    pairs += [(at, min(at + 1, dim)) for at in range(2 * num_turning, dim, 2)]
    return [one for one, _ in pairs], [two for _, two in pairs]
