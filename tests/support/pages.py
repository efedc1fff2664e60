"""Pages of an engine in every order that one may state."""

import torch

from kvlab.paged import page_layout

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 11, 2, 4, 10


def caches(order: str, dtype: torch.dtype = torch.float16, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Per-layer views [B, H, N, C] of one storage whose memory order is `order`, as vLLM hands them over."""
    sizes = dict(zip("LBHNC", (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT), strict=True))
    num_bytes = LAYERS * BLOCKS * HEADS * TOKENS * CONTENT * dtype.itemsize
    raw = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    whole = raw.view(dtype).reshape([sizes[axis] for axis in order])
    logical = whole.permute([order.index(axis) for axis in "LBHNC"])
    return {f"layer.{i}": logical[i] for i in range(LAYERS)}


def layout(order: str, dtype: torch.dtype = torch.float16):
    kv = caches(order, dtype)
    size = HEADS * TOKENS * CONTENT * dtype.itemsize
    return kv, page_layout(kv, num_blocks=BLOCKS, page_bytes=dict.fromkeys(kv, size), name=order)
