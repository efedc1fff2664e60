"""One block of an engine's pages as bytes of one size: what a slot of host memory holds where its tier has a codec.

A block is an object of its own: its groups end with it, so any blocks of an object are loaded without the others. Only
kinds of a fixed rate have slots of one size. The bytes are the serde's parts, in order and each at a multiple of 256;
all bytes between and behind them are zeros, so that a slot tells of nothing but its block.
"""

from collections.abc import Sequence
from functools import cache

import torch

from kvlab.codecs.pages import PageCodec
from kvlab.codecs.plan import Plan, fixed_plan, no_fixed_size
from kvlab.paged.typed import Opaque, PageMap
from kvlab.serde.base import Serde


class BlockCodec:
    """Codes blocks of so many layers' pages.

    Raises
    ------
    ConfigError
        where the serde has no fixed rate, or cannot code such pages, with the reason
    """

    def __init__(self, serde: Serde, page_map: PageMap | Opaque, num_layers: int) -> None:
        self._pages = PageCodec(serde, page_map)
        if isinstance(page_map, Opaque):  # which kinds take that have no fixed size
            raise no_fixed_size(serde)
        self.serde, self.map, self.num_layers = serde, page_map, num_layers
        self.dtype = str(page_map.element).removeprefix("torch.")
        self.plan = cache(self._plan)
        self.slot_bytes = slot_bytes(serde, page_map.shape(num_layers, page_map.block_tokens), self.dtype)

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
        return fixed_plan(self.serde, self.map.shape(self.num_layers, num_tokens), self.dtype)


def slot_bytes(serde: Serde, shape: Sequence[int], dtype: str) -> int:
    """Bytes of a slot for a block of typed KV of this shape (layers, tokens, kv_heads, kv, head_dim), or of its first
    tokens: these may have shorter groups, in parts of their own."""
    layers, block_tokens, *rest = shape
    plans = (fixed_plan(serde, (layers, n, *rest), dtype) for n in range(1, block_tokens + 1))
    return max(plan.num_bytes for plan in plans)
