"""Blocks of host memory that hold what a `KVTransform` keeps of the engine's pages."""

import logging
from collections.abc import Callable

import torch

from kvlab.codecs.blocks import BlockCodec
from kvlab.errors import ConfigError
from kvlab.paged import Opaque, PageMap
from kvlab.serde.groups import FLOATS
from kvlab.transforms import get_transform

logger = logging.getLogger("vllm.kvlab")


class TransformedBlocks(BlockCodec):
    """What a transfer asks of a codec: a slot holds the block's pages as they are, but for their KV.

    Raises
    ------
    ConfigError
        where the pages are not proven to hold plain numbers, or lie on a GPU
    """

    def __init__(self, spec: str, page_map: PageMap | Opaque, num_layers: int, device: str) -> None:
        # No serde: of a BlockCodec, a transfer on a CPU uses the four names set here, encode and decode.
        if isinstance(page_map, Opaque):
            raise ConfigError(f"transform {spec!r} needs KV, and these pages are opaque: {page_map.reason}")
        self.dtype = str(page_map.element).removeprefix("torch.")
        if self.dtype not in FLOATS:
            raise ConfigError(f"transform {spec!r} takes {', '.join(sorted(FLOATS))}, these pages hold {self.dtype}")
        if device != "cpu":
            raise ConfigError(f"transform {spec!r} runs on a CPU alone, and the engine's pages lie on {device}")
        self._spec, self._transform, self._has_failed = spec, get_transform(spec), False
        self.map, self.num_layers, self.slot_bytes = page_map, num_layers, num_layers * page_map.page_bytes

    def encode(self, pages: torch.Tensor, num_tokens: int, slot: torch.Tensor) -> None:
        """ConfigError, and the slot holds nothing, where the result is of another shape or holds NaN or infinity."""
        slot.zero_()
        kept = self._through(self._transform.on_save, self.map.read(pages[None], num_tokens))
        self.map.write(kept, slot.view(1, self.num_layers, self.map.page_bytes))

    def decode(self, slot: torch.Tensor, num_tokens: int, pages: torch.Tensor) -> None:
        pages.zero_()
        held = self.map.read(slot.view(1, self.num_layers, self.map.page_bytes), num_tokens)
        self.map.write(self._through(self._transform.on_load, held), pages[None])

    def _through(self, function: Callable[[torch.Tensor], torch.Tensor], kv: torch.Tensor) -> torch.Tensor:
        shape, dtype = tuple(kv.shape), kv.dtype
        try:
            with torch.inference_mode():
                made: object = function(kv)
        except (Exception, SystemExit) as error:
            if not self._has_failed:
                logger.exception("kvlab: transform %r failed", self._spec)
            self._has_failed = True
            raise ConfigError(f"transform {self._spec!r} raised {type(error).__name__}") from error
        if not isinstance(made, torch.Tensor) or tuple(made.shape) != shape or made.dtype != dtype:
            raise ConfigError(f"transform {self._spec!r} must return {dtype}{list(shape)}")
        if not bool(made.isfinite().all()):
            raise ConfigError(f"transform {self._spec!r} made NaN or infinity, which would reach every answer")
        return made
