"""How an engine holds KV: one page per block and layer, as bytes at fixed strides.

Nothing is guessed from a tensor's shape. The engine states the number of blocks, the bytes of a page and the name
of its layout; strides are checked against them, and what does not fit is refused with its strides in the message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvlab.errors import ConfigError
from kvlab.hostmemory import aligned

# Layout names in which the inside of a page is one run of bytes (the letters of vLLM's v1/kv_cache_layout.py:
# Layers, Blocks, Heads, tokeNs, Content in memory order; NHD and HND are the older names). In LHBNC and BHLNC a
# page is scattered per head.
COMPACT_LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC", "NHD", "HND")


@dataclass(frozen=True)
class PageLayout:
    """Pages of all layers as byte views.

    `pages[l]` is uint8 [num_blocks, page_bytes] with strides (block_stride, 1) over the engine's own memory.
    `layer_names` gives the layers in the order of a chunk buffer; of layers that share their memory, as those of
    different KV cache groups may, the first.
    """

    layer_names: tuple[str, ...]
    pages: tuple[torch.Tensor, ...]
    name: str

    def __repr__(self) -> str:
        about = f"{self.num_blocks} blocks, {self.num_layers} layers, pages of {self.page_bytes:,} bytes"
        return f"PageLayout({self.name}, {about}, block stride {self.block_stride:,})"

    # Tensors are asked once: each answer of theirs takes as long as a small numpy operation.

    @cached_property
    def num_layers(self) -> int:
        return len(self.pages)

    @cached_property
    def num_blocks(self) -> int:
        return self.pages[0].shape[0]

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one layer's page."""
        return self.pages[0].shape[1]

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.page_bytes

    @cached_property
    def block_stride(self) -> int:
        """Bytes from a page to that of the next block."""
        return self.pages[0].stride(0)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each layer's page of block 0 starts."""
        return tuple(pages.data_ptr() for pages in self.pages)

    def buffer(self, num_blocks: int, *, device: str | torch.device = "cpu") -> torch.Tensor:
        """An uninitialised chunk buffer: uint8 [blocks, layers, page_bytes]. In host memory it starts at a multiple of
        4,096, so that direct I/O writes whole blocks of it without a copy."""
        shape = (num_blocks, self.num_layers, self.page_bytes)
        if torch.device(device).type != "cpu":
            return torch.empty(shape, dtype=torch.uint8, device=device)
        return aligned_bytes(num_blocks * self.block_bytes).view(shape)


def aligned_bytes(num_bytes: int) -> torch.Tensor:
    """Uninitialised host memory, uint8 [num_bytes], that starts at a multiple of 4,096."""
    return torch.frombuffer(aligned(num_bytes), dtype=torch.uint8)[:num_bytes]


def page_layout(
    kv_caches: Mapping[str, torch.Tensor],
    *,
    num_blocks: int,
    page_bytes: Mapping[str, int],
    name: str,
    content_bytes: Mapping[str, int] | None = None,
) -> PageLayout:
    """Byte views of an engine's pages.

    Parameters
    ----------
    kv_caches
        layer name -> the engine's tensor, blocks in dimension 0; an engine may split one block of its
        tables into several of the tensor's rows.
    num_blocks
        blocks in the engine's tables.
    page_bytes
        layer name -> bytes of one block's page, as the engine states them.
    name
        the engine's own name of the layout; one of COMPACT_LAYOUTS.
    content_bytes
        layer name -> bytes at the beginning of a page that the engine's tensor shows, of layers whose pages are
        padded.

    Raises ConfigError where the strides do not make each page one run of bytes, or layers differ in page size.
    """
    if name not in COMPACT_LAYOUTS:
        raise ConfigError(
            f"KV cache layout must be one of {', '.join(COMPACT_LAYOUTS)} (a page in one run of bytes), "
            f"got {name!r}; choose another with VLLM_KV_CACHE_LAYOUT"
        )
    if not kv_caches:
        raise ConfigError("the engine registered no KV cache; kvlab needs a model with attention layers")
    sizes = {page_bytes[layer] for layer in kv_caches}
    if len(sizes) != 1:
        raise ConfigError(
            f"all layers must have pages of one size, got {sorted(sizes)} bytes; this model is not served yet"
        )
    views: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}  # groups of layers may lie over each other
    for layer, cache in kv_caches.items():
        where = (
            f"layer {layer}: shape {tuple(cache.shape)}, strides {cache.stride()}, dtype {cache.dtype}, "
            f"layout {name}, {num_blocks} blocks"
        )
        if cache.dim() < 2 or cache.shape[0] % num_blocks:
            raise ConfigError(f"dimension 0 must count blocks; {where}")
        rows = cache.shape[0] // num_blocks
        item = cache.element_size()
        page = cache[0].numel() * item * rows
        stride = cache.stride(0) * item * rows
        wanted = (content_bytes or {}).get(layer, page_bytes[layer])
        fits = page == wanted and stride >= page_bytes[layer] >= page
        if not fits or not _is_one_run(cache[0]) or (rows > 1 and stride != page):
            raise ConfigError(f"a page must be one run of {wanted} bytes, found {page} at stride {stride}; {where}")
        raw = torch.empty(0, dtype=torch.uint8, device=cache.device)
        view = raw.set_(
            cache.untyped_storage(), cache.storage_offset() * item, (num_blocks, page_bytes[layer]), (stride, 1)
        )
        views.setdefault((view.data_ptr(), stride), (layer, view))
    names, pages = zip(*views.values(), strict=True)
    return PageLayout(names, pages, name)


def _is_one_run(page: torch.Tensor) -> bool:
    """True where the elements of `page` fill one run of memory in some order of its axes."""
    expected = 1
    for stride, size in sorted(zip(page.stride(), page.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def check_block_ids(block_ids: Sequence[int], num_blocks: int) -> None:
    """Raise ConfigError if a block id lies outside the engine's pages."""
    if block_ids and not 0 <= min(block_ids) <= max(block_ids) < num_blocks:
        raise ConfigError(f"block ids must be in [0, {num_blocks}), got {min(block_ids)} to {max(block_ids)}")
