"""One block of an engine's pages as bytes of one size: what a slot of host memory holds where its tier has a codec.

A block is an object of its own: its groups end with it, so any blocks of an object are loaded without the others. Only
kinds of a fixed rate have slots of one size. The bytes are the serde's parts, in order and each at a multiple of 256;
all bytes between and behind them are zeros, so that a slot tells of nothing but its block.
"""

from collections.abc import Sequence
from functools import cache

import torch

from kvlab.codecs.pages import PageCodec
from kvlab.codecs.plan import Plan, scaled_plan
from kvlab.errors import ConfigError
from kvlab.paged.typed import Opaque, PageMap
from kvlab.serde.base import Serde
from kvlab.serde.quantized import ScaledSerde


class BlockCodec:
    """Codes blocks of so many layers' pages.

    Raises
    ------
    ConfigError
        where the serde has no fixed rate, or cannot code such pages, with the reason
    """

    def __init__(self, serde: Serde, page_map: PageMap | Opaque, num_layers: int) -> None:
        fixed = fixed_rate(serde)
        self._pages = PageCodec(serde, page_map)
        assert isinstance(page_map, PageMap)  # or the line before has refused it
        self.serde, self.map, self.num_layers = fixed, page_map, num_layers
        self.dtype = str(page_map.element).removeprefix("torch.")
        self.plan = cache(self._plan)
        self.slot_bytes = slot_bytes(fixed, page_map.shape(num_layers, page_map.block_tokens), self.dtype)

    def encode(self, pages: torch.Tensor, num_tokens: int, slot: torch.Tensor) -> None:
        """The first `num_tokens` tokens of a block's pages, uint8 (layers, page_bytes), into `slot`, uint8
        (slot_bytes). ConfigError, and the slot holds nothing, where a number is NaN or infinite."""
        slot.zero_()
        encoded = self._pages.encode(pages[None], num_tokens)
        for name, part in self.plan(num_tokens).views(slot).items():
            part.copy_(encoded.parts[name])

    def decode(self, slot: torch.Tensor, num_tokens: int, pages: torch.Tensor) -> None:
        """What `encode` made, into the block's pages; every other byte of them becomes zero."""
        pages.zero_()
        self._pages.decode(self.plan(num_tokens).encoded(slot), pages[None])

    def _plan(self, num_tokens: int) -> Plan:
        return scaled_plan(self.serde, self.map.shape(self.num_layers, num_tokens), self.dtype)


def fixed_rate(serde: Serde) -> ScaledSerde:
    """`serde`, or ConfigError where its objects have no size that is known beforehand."""
    if not isinstance(serde, ScaledSerde):
        raise ConfigError(
            f"serde {serde.spec!r} has no fixed size, which slots of host memory need; use int8, int4 or fp8 there"
        )
    return serde


def slot_bytes(serde: Serde, shape: Sequence[int], dtype: str) -> int:
    """Bytes of a slot for a block of typed KV of this shape (layers, tokens, kv_heads, kv, head_dim), or of its first
    tokens: these may have shorter groups, in parts of their own."""
    layers, block_tokens, *rest = shape
    plans = (scaled_plan(fixed_rate(serde), (layers, n, *rest), dtype) for n in range(1, block_tokens + 1))
    return max(plan.num_bytes for plan in plans)
