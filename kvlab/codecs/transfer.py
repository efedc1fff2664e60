"""Blocks between an engine's pages and slots that hold them encoded: `kvlab.paged.Transfer` with a codec."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvlab.codecs.blocks import BlockCodec
from kvlab.errors import ConfigError
from kvlab.paged.cpu import CPUTransfer
from kvlab.paged.layout import PageLayout, check_block_ids
from kvlab.paged.transfer import Transfer
from kvlab.sharedmemory import SharedSlots

logger = logging.getLogger("vllm.kvlab")


class CodedCPUTransfer(CPUTransfer):
    """Pages and slots in the same memory, coded by the twin. `arena` is uint8 [slots, slot_bytes]."""

    def __init__(
        self, layout: PageLayout, codec: BlockCodec, num_slots: int, *, shared: SharedSlots | None = None
    ) -> None:
        super().__init__(layout, num_slots, shared=shared, slot_shape=(codec.slot_bytes,))
        self.codec = codec
        self.coded_tokens = codec.map.block_tokens
        self._unfit: set[int] = set()
        self._block = np.zeros((layout.num_layers, layout.page_bytes), np.uint8)

    def save(self, block_ids: Sequence[int], slots: Sequence[int], num_tokens: Sequence[int] = ()) -> None:
        """Encode pages into slots; done when it returns."""
        check_block_ids(block_ids, self.layout.num_blocks)
        counts = num_tokens or [self.coded_tokens] * len(slots)
        for block_id, slot, count in zip(block_ids, slots, counts, strict=True):
            for layer, pages in enumerate(self._pages):
                self._block[layer] = pages[block_id]
            try:
                self.codec.encode(torch.from_numpy(self._block), count, self.arena[slot])
            except ConfigError as error:  # a number that is none
                logger.debug("kvlab: a block is not kept: %s", error)
                self._unfit.add(slot)

    def _fill(self, blocks: Sequence[NDArray[np.uint8]], block_ids: Sequence[int], num_tokens: Sequence[int]) -> None:
        """Decode blocks into pages; done when it returns."""
        check_block_ids(block_ids, self.layout.num_blocks)
        counts = num_tokens or [self.coded_tokens] * len(blocks)
        for block_id, block, count in zip(block_ids, blocks, counts, strict=True):
            coded = torch.from_numpy(block if block.flags.writeable else block.copy())
            self.codec.decode(coded, count, torch.from_numpy(self._block))
            for layer, pages in enumerate(self._pages):
                pages[block_id] = self._block[layer]

    def take_unfit(self, wait_for: Sequence[int] | None = ()) -> set[int]:
        unfit, self._unfit = self._unfit, set()
        return unfit


def open_coded_transfer(
    layout: PageLayout, codec: BlockCodec, num_slots: int, *, staging_bytes: int, shared: SharedSlots | None = None
) -> Transfer:
    """`kvlab.paged.open_transfer` for slots that hold what `codec` makes of a block."""
    if (codec.num_layers, codec.map.page_bytes) != (layout.num_layers, layout.page_bytes):
        raise ConfigError(f"a codec of {codec.num_layers} layers, {codec.map}, does not fit {layout}")
    if layout.pages[0].device.type != "cuda":
        return CodedCPUTransfer(layout, codec, num_slots, shared=shared)
    from kvlab.codecs.cuda import CodedCudaTransfer  # loads Triton

    return CodedCudaTransfer(layout, codec, num_slots, staging_bytes=staging_bytes, shared=shared)
