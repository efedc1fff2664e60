"""What differs between vLLM versions, found by looking for the feature, never by comparing versions.

Written against 0.26 (CUDA) and 0.32 (CPU).
"""

from importlib.util import find_spec
from typing import Any

import torch

from kvlab.errors import ConfigError


def layout_name(vllm_config: Any, kv_cache_config: Any) -> str:
    """The engine's own name of the KV cache layout."""
    name = getattr(kv_cache_config, "kv_cache_layout", None) or getattr(
        vllm_config.cache_config, "kv_cache_layout", None
    )
    if name is not None:
        return str(getattr(name, "name", name))
    from vllm.v1.attention.backends import utils  # before the layout became part of the config

    return str(utils.get_kv_cache_layout())


def single_group(kv_cache_config: Any) -> Any:
    """The only KV cache group, or ConfigError: several are not served."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
        raise ConfigError(
            f"this model has {len(groups)} KV cache groups ({kinds}); kvlab serves models with one. "
            "Run it without the connector, or with --disable-hybrid-kv-cache-manager where the model allows it"
        )
    return groups[0]


def page_bytes(group: Any) -> dict[str, int]:
    """Layer name -> bytes of one block's page, as the engine states them."""
    spec = group.kv_cache_spec
    per_layer = getattr(spec, "kv_cache_specs", None)  # layers of one kind that differ in size
    if per_layer:
        return {layer: per_layer[layer].page_size_bytes for layer in group.layer_names}
    return {layer: spec.page_size_bytes for layer in group.layer_names}


def refuse_unserved(vllm_config: Any, group: Any) -> None:
    """ConfigError for setups whose KV would be named or copied wrongly."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size must be 1 with KVLabConnector, got {parallel.pipeline_parallel_size}; "
            "use tensor parallelism"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name} must be 1 with KVLabConnector, got {getattr(parallel, name)}")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.use_eagle():
        raise ConfigError(
            "speculative decoding with a draft model's own KV (eagle, mtp) is not served: "
            "that KV depends on later tokens than its key says; turn one of the two off"
        )
    if "Mamba" in type(group.kv_cache_spec).__name__ or getattr(group, "is_eagle_group", False):
        raise ConfigError(
            f"KV cache of kind {type(group.kv_cache_spec).__name__} is a running state, not per-token KV; "
            "run this model without the connector"
        )


def packing(vllm_config: Any, group: Any) -> str:
    """What decides the order of bytes inside a page besides the layout's name.

    On a CPU the attention kernel packs pages for the instruction set at hand, so two hosts' pages may differ.
    """
    backend = str(getattr(vllm_config, "attention_config", None) and vllm_config.attention_config.backend)
    if vllm_config.device_config.device_type != "cpu":
        return backend
    capability = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu._is_amx_tile_supported()
    return f"{backend}/{capability}/amx={amx}"


def hit_sources() -> Any | None:
    """vLLM's enumeration of cache hit sources, where it has one."""
    if find_spec("vllm.v1.metrics.cache_hit_source") is None:
        return None
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    return CacheHitSource
