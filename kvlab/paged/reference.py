"""Gather and scatter between an engine's pages and one chunk buffer, in plain torch: the oracle and the CPU path."""

from collections.abc import Sequence

import torch

from kvlab.errors import ConfigError
from kvlab.paged.layout import PageLayout, check_block_ids


def _checked(layout: PageLayout, block_ids: Sequence[int], buffer: torch.Tensor) -> torch.Tensor:
    check_block_ids(block_ids, layout.num_blocks)
    want = (len(block_ids), layout.num_layers, layout.page_bytes)
    if tuple(buffer.shape) != want or buffer.dtype != torch.uint8:
        raise ConfigError(
            f"chunk buffer must be uint8{list(want)} (blocks, layers, page_bytes), "
            f"got {buffer.dtype}{list(buffer.shape)}"
        )
    return torch.as_tensor(block_ids, dtype=torch.int64, device=layout.pages[0].device)


def gather(layout: PageLayout, block_ids: Sequence[int], out: torch.Tensor) -> torch.Tensor:
    """Copy the pages of `block_ids` into `out`, uint8 [blocks, layers, page_bytes]; returns `out`."""
    index = _checked(layout, block_ids, out)
    for layer, pages in enumerate(layout.pages):
        out[:, layer] = pages[index]
    return out


def scatter(layout: PageLayout, block_ids: Sequence[int], buffer: torch.Tensor) -> None:
    """Copy `buffer`, uint8 [blocks, layers, page_bytes], into the pages of `block_ids`, which must differ."""
    index = _checked(layout, block_ids, buffer)
    for layer, pages in enumerate(layout.pages):
        pages[index] = buffer[:, layer].to(pages.device)
