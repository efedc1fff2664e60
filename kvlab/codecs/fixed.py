"""Kinds whose objects have a size that is known beforehand, on the device where the pages lie."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

from kvlab.codecs.addresses import Addresses
from kvlab.codecs.launch import Launch
from kvlab.codecs.plan import Plan, fixed_plan, num_tokens_of
from kvlab.codecs.scaled_triton import FLOATS
from kvlab.errors import ConfigError
from kvlab.serde.base import Encoded, Serde

S = TypeVar("S", bound=Serde)


class FixedCodec(ABC, Generic[S]):
    """Launches over the pages of one KV cache group. Everything is enqueued on the current stream; nothing is waited
    for. Block ids are checked; what they name is not."""

    def __init__(self, serde: S, addresses: Addresses) -> None:
        self.serde, self.name, self._at = serde, serde.spec, addresses
        self.pages, self._map = addresses.pages, addresses.pages.map
        self.dtype = str(self._map.element).removeprefix("torch.")
        if self.dtype not in FLOATS:
            raise ConfigError(f"serde {serde.spec!r} takes {', '.join(FLOATS)}, pages hold {self.dtype}")
        self._plans: dict[int, Plan] = {}
        self._made: dict[tuple[str, int, int, int], list[Launch]] = {}

    @abstractmethod
    def _encodings(self, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        """Programs that make one object of so many tokens in so many blocks; `each`: bytes from one to the next."""

    @abstractmethod
    def _decodings(self, num_tokens: int, object_blocks: int, each: int) -> list[Launch]:
        """Programs that put such an object into pages."""

    def plan(self, num_tokens: int) -> Plan:
        """The parts of an object of so many tokens."""
        if num_tokens not in self._plans:
            shape = self._map.shape(self._at.num_layers, num_tokens)
            self._plans[num_tokens] = fixed_plan(self.serde, shape, self.dtype)
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
            make = self._encodings if what == "encode" else self._decodings
            self._made[key] = make(num_tokens, object_blocks, each)
        return self._made[key]
