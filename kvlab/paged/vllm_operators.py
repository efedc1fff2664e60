"""vLLM's own write operators over scratch pages, for the probe.

`of_layer` takes an engine's attention layer, whatever its backend, and asks it to write as it does in a step.
`cpu_attention` and `cpu_latents` are the operators of the CPU backends alone, without an engine; vLLM is imported
for them on use.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvlab.errors import ConfigError
from kvlab.paged.probe import BLOCKS, Scratch
from kvlab.paged.typed import Opaque

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_Write = Callable[[Sequence[torch.Tensor], torch.Tensor], None]


def of_layer(
    layer: Any, cache: torch.Tensor, *, num_blocks: int, block_tokens: int, page_bytes: int, given: torch.dtype
) -> Scratch | Opaque:
    """Scratch pages that an engine's layer writes to.

    Parameters
    ----------
    layer
        vLLM's attention layer: ``vllm_config.compilation_config.static_forward_context[name]``
    cache
        its KV cache, for shape and strides; it is not touched
    num_blocks, block_tokens, page_bytes
        blocks in the engine's tables, the tokens of one, and the bytes of its page
    given
        dtype of the model

    Returns
    -------
    Scratch or Opaque
        `Opaque` where this layer's elements are no plain numbers, or it has no write operator of its own
    """
    stored = str(getattr(layer, "kv_cache_dtype", "auto"))
    element = cache.dtype if stored == "auto" or cache.dtype != torch.uint8 else FP8.get(stored)
    if element is None or (stored not in FP8 and cache.dtype == torch.uint8):
        return Opaque(f"a KV cache of kind {stored} holds numbers with scales between them")
    update = getattr(getattr(layer, "impl", None), "do_kv_cache_update", None)
    if update is None:
        return Opaque(f"attention backend {type(getattr(layer, 'impl', None)).__name__} has no write operator to ask")
    rows = cache.shape[0] // num_blocks
    scratch = _like(cache, BLOCKS * rows)
    pages = _bytes_of(scratch, rows, page_bytes)
    scales = tuple(float(getattr(layer, f"_{letter}_scale_float", 1.0)) for letter in "kv")
    rank = getattr(layer, "kv_lora_rank", None)
    write: _Write
    if rank is not None:

        def write(planes: Sequence[torch.Tensor], slots: torch.Tensor) -> None:
            content, rope = planes[0][:, 0, :rank].contiguous(), planes[0][:, :, rank:].contiguous()
            update(content, rope, scratch, slots, stored, layer._k_scale)

        heads, dim = 1, rank + layer.qk_rope_head_dim
    else:
        if getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
            return Opaque(f"K and V differ in width ({layer.head_size} and {layer.head_size_v})")

        def write(planes: Sequence[torch.Tensor], slots: torch.Tensor) -> None:
            update(layer, planes[0].contiguous(), planes[1].contiguous(), scratch, slots)

        heads, dim = layer.num_kv_heads, layer.head_size
    return Scratch(pages, write, block_tokens, heads, dim, element, given, rank is not None, scales, rows)


def cpu_attention(
    *,
    block_tokens: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    isa: str | None = None,
    kv_cache_dtype: str = "auto",
    scales: tuple[float, float] = (1.0, 1.0),
) -> Scratch:
    """The packing operator of vLLM's CPU attention; `isa` is that of this machine where none is named."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends import cpu_attn

    chosen = isa or cpu_attn._get_attn_isa(dtype, block_tokens, head_dim, kv_cache_dtype)
    stored = FP8.get(kv_cache_dtype)
    if kv_cache_dtype != "auto" and stored is None:
        raise ConfigError(f"kv_cache_dtype must be auto, {', '.join(FP8)}; got {kv_cache_dtype!r}")
    cache = torch.empty((BLOCKS, kv_heads, block_tokens, 2 * head_dim), dtype=torch.uint8 if stored else dtype)
    # As CPUAttentionBackendImpl.do_kv_cache_update has it.
    keys, values = cache.view(BLOCKS, kv_heads, 2 * block_tokens, head_dim).chunk(2, dim=2)

    def write(planes: Sequence[torch.Tensor], slots: torch.Tensor) -> None:
        k, v = (plane.contiguous() for plane in planes)
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, chosen, *scales, kv_cache_dtype)

    pages = _bytes_of(cache, 1, cache[0].numel() * cache.element_size())
    return Scratch(pages, write, block_tokens, kv_heads, head_dim, stored or dtype, dtype, scales=scales)


def cpu_latents(*, block_tokens: int, rank: int, rope_dim: int, dtype: torch.dtype = torch.bfloat16) -> Scratch:
    """The operator that writes the latents of MLA on a CPU."""
    from vllm import _custom_ops as ops

    cache = torch.empty((BLOCKS, block_tokens, rank + rope_dim), dtype=dtype)

    def write(planes: Sequence[torch.Tensor], slots: torch.Tensor) -> None:
        latents = planes[0][:, 0]
        ops.amx_mla_concat_and_cache(latents[:, :rank].contiguous(), latents[:, rank:].contiguous(), cache, slots)

    pages = _bytes_of(cache, 1, cache[0].numel() * cache.element_size())
    return Scratch(pages, write, block_tokens, 1, rank + rope_dim, dtype, dtype, latent=True)


def _like(cache: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A tensor of `num_rows` rows of the kernel with the cache's strides, and memory of its own."""
    return torch.empty_strided((num_rows, *cache.shape[1:]), cache.stride(), dtype=cache.dtype, device=cache.device)


def _bytes_of(cache: torch.Tensor, rows: int, page_bytes: int) -> torch.Tensor:
    """uint8 (blocks, page_bytes) over `cache`, whose pages are runs of bytes."""
    raw = torch.empty(0, dtype=torch.uint8, device=cache.device)
    shape = (cache.shape[0] // rows, page_bytes)
    return raw.set_(cache.untyped_storage(), 0, shape, (cache.stride(0) * cache.element_size() * rows, 1))
