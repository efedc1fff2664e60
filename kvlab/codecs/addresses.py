"""A page map as a GPU program reads it: short tables of places, in elements."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvlab.errors import ConfigError
from kvlab.paged.layout import check_block_ids
from kvlab.paged.typed import Plane, TypedPages

ACCESS_BYTES = 16  # of the widest access


@dataclass(frozen=True)
class PlaneTables:
    """Places of one plane's tokens, heads and channels: int32 on the device. `stride` is that of the channels, 0 where
    only their table tells; `align` how many elements an access may take at once."""

    tokens: torch.Tensor
    heads: torch.Tensor
    channels: torch.Tensor
    stride: int
    align: int


class Addresses:
    """Where the elements of an engine's pages lie: addresses of layers, and a few tables for each plane."""

    def __init__(self, pages: TypedPages) -> None:
        self.pages = pages
        layout, page_map = pages.layout, pages.map
        self.device = layout.pages[0].device
        self.item = page_map.element.itemsize
        self.num_layers = pages.num_layers
        strides = {layout.pages[layer].stride(0) for layer in range(pages.num_layers)}
        if len(strides) != 1 or layout.block_stride % self.item:
            raise ConfigError(
                f"all layers must have one block stride, a multiple of {self.item}; got {sorted(strides)}"
            )
        self.block_stride = layout.block_stride // self.item
        starts = layout.addresses[: pages.num_layers]
        if any(start % self.item for start in starts):
            raise ConfigError(f"pages of {page_map.element} must start at multiples of {self.item} bytes")
        self.pointers = self.table(starts, torch.int64)
        aligned = layout.block_stride % ACCESS_BYTES == 0 and not any(start % ACCESS_BYTES for start in starts)
        self.planes = tuple(self._plane(plane, aligned) for plane in page_map.planes)

    def ids(self, objects: Sequence[Sequence[int]]) -> torch.Tensor:
        """Block ids of objects with as many blocks each, one after the other on the device, int32; ConfigError where
        one lies outside of the engine's pages."""
        flat = [block_id for block_ids in objects for block_id in block_ids]
        check_block_ids(flat, self.pages.layout.num_blocks)
        if len({len(block_ids) for block_ids in objects}) != 1:
            raise ConfigError("objects that are coded together must have as many blocks each")
        return self.table(flat, torch.int32)

    def _plane(self, plane: Plane, aligned: bool) -> PlaneTables:
        tokens, heads, channels = (
            [at // self.item for at in table] for table in (plane.tokens, plane.heads, plane.channels)
        )
        first, stride = channels[0], channels[1] - channels[0] if len(channels) > 1 else 1
        regular = channels == [first + stride * at for at in range(len(channels))]
        if regular:  # its beginning goes to the heads'
            heads, channels = [at + first for at in heads], [at - first for at in channels]
        per_access = ACCESS_BYTES // self.item
        whole = aligned and regular and stride == 1 and not any(at % per_access for at in (*tokens, *heads))
        made = [self.table(table, torch.int32) for table in (tokens, heads, channels)]
        return PlaneTables(made[0], made[1], made[2], stride if regular else 0, per_access if whole else 1)

    def table(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Numbers on the device."""
        table = torch.tensor(list(values), dtype=dtype)
        if self.device.type != "cuda":
            return table
        return table.pin_memory().to(self.device, non_blocking=True)
