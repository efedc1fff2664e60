"""What differs between vLLM versions, found by looking for the feature, never by comparing versions.

Written against 0.26 (CUDA) and 0.32 (CPU).
"""

from importlib.util import find_spec
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1 import base as connector_base
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvlab.connectors.vllm import states
from kvlab.connectors.vllm.adapters import watch
from kvlab.connectors.vllm.kv_groups import STATE_WINDOW, KVGroups
from kvlab.errors import ConfigError

# Requests whose async loads ended, and those of them that must be recomputed; of versions that ask for it.
TransferResults: Any = getattr(connector_base, "KVConnectorTransferResults", None)
DRAFTS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")
DRAFTS_OF_TOKENS = ("draft_model",)  # whose KV follows from the tokens, as the model's own: objects hold both
DRAFTS_OF_NEXT_TOKEN = ("eagle", "eagle3", "mtp")  # whose KV of a token follows from the next one too


def layout_name(vllm_config: Any, kv_cache_config: Any) -> str:
    """The engine's own name of the KV cache layout."""
    name = getattr(kv_cache_config, "kv_cache_layout", None) or getattr(
        vllm_config.cache_config, "kv_cache_layout", None
    )
    if name is not None:
        return str(getattr(name, "name", name))
    from vllm.v1.attention.backends import utils  # before the layout became part of the config

    with set_current_vllm_config(vllm_config):  # which it asks for; only a worker's process has one set
        return str(utils.get_kv_cache_layout())


def served_groups(kv_cache_config: Any, *, ahead: int = 0) -> KVGroups:
    """What the engine's KV cache groups need, with `draft_ahead`; or ConfigError where that is not known, or a failed
    load could not be made good: this takes a connector interface that hears of failures by request."""
    groups = kv_cache_config.kv_cache_groups
    kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups) or "none"
    what = f"this model has {len(groups)} KV cache groups ({kinds})"
    instead = "Run it without the connector, or with --disable-hybrid-kv-cache-manager where the model allows it"
    specs = [states.specs_of(group) for group in groups]
    if not all(states.is_recurrent(spec) or _follows_from_what_is_before(spec) for each in specs for spec in each):
        raise ConfigError(
            f"{what}; kvlab serves layers that see the whole prefix or a sliding window, or have a recurrent state. "
            f"{instead}"
        )
    windows = [{_window(spec) for spec in each} for each in specs]
    sizes = {group.kv_cache_spec.block_size for group in groups}
    if len(sizes) != 1 or any(len(of_group) != 1 for of_group in windows):
        raise ConfigError(
            f"{what}, blocks of {sorted(sizes)} tokens; kvlab needs one size and one window each. {instead}"
        )
    seen, recurrent = tuple(of_group.pop() for of_group in windows), states.recurrent_groups(groups)
    found = KVGroups(seen, sizes.pop(), recurrent, ahead)
    if found.fail_whole and not hasattr(connector_base.KVConnectorBase_V1, "get_transfer_results"):
        raise ConfigError(f"{what}; with this version of vLLM kvlab serves one, of layers without a window. {instead}")
    return found


def _window(spec: Any) -> int | None:
    if states.is_recurrent(spec):
        return STATE_WINDOW
    return spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None


def _follows_from_what_is_before(spec: Any) -> bool:
    """Whether a token's KV is told by it and those before it, and stays until the request or a window leaves it."""
    odd = (
        getattr(spec, "non_causal", False)
        or hasattr(spec, "rswa_window")
        or "Hidden" in type(spec).__name__
        or getattr(spec, "tokens_per_state", 1) != 1
    )
    return isinstance(spec, FullAttentionSpec | SlidingWindowSpec) and not odd


def page_bytes(group: Any) -> dict[str, int]:
    """Layer name -> bytes of one block's page, as the engine states them."""
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    return {layer: specs.get(layer, group.kv_cache_spec).page_size_bytes for layer in group.layer_names}


def stage_layers(vllm_config: Any) -> list[int]:
    """Layers of each pipeline stage, as vLLM divides them among its ranks."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    total = vllm_config.model_config.get_total_num_hidden_layers()
    ends = [get_pp_indices(total, stage, stages) for stage in range(stages)]
    return [end - start for start, end in ends]


def slot_bytes(vllm_config: Any, kv_cache_config: Any) -> int:
    """Bytes of one block of the engine's pool, of the rank that has most of it: all ranks count the same slots.
    ConfigError where a rank cannot tell from its own layers what another stage has."""
    pages = [page_bytes(group) for group in kv_cache_config.kv_cache_groups]
    stages = stage_layers(vllm_config)
    if len(stages) == 1:
        return max(sum(group.values()) for group in pages)  # a page of the pool serves any group
    if len(pages) != 1 or len(set(pages[0].values())) != 1 or len(pages[0]) not in stages:
        raise ConfigError(
            f"this model's layers differ, and {len(stages)} pipeline stages would hold blocks of other sizes; "
            "set pipeline_parallel_size to 1 and use tensor parallelism"
        )
    return max(stages) * next(iter(pages[0].values()))


def typed_blocks(vllm_config: Any, kv_cache_config: Any) -> set[tuple[tuple[int, int, int, int, int], str]]:
    """What the specs of groups say a block holds, on the rank that has most of it: the shape (layers, tokens, kv_heads,
    kv, head_dim) and the dtype of an element. Layers of one group that differ give it several."""
    stages = stage_layers(vllm_config)
    found: set[tuple[tuple[int, int, int, int, int], str]] = set()
    for group in kv_cache_config.kv_cache_groups:
        for spec in states.specs_of(group):
            layers = len(group.layer_names) if len(stages) == 1 else max(stages)
            planes = 1 if "MLA" in type(spec).__name__ else 2
            shape = (layers, spec.block_size, spec.num_kv_heads, planes, spec.head_size)
            found.add((shape, str(spec.dtype).removeprefix("torch.")))
    return found


def drafts_have_kv(vllm_config: Any) -> bool:
    """Whether pages hold a draft model's KV too, which it may have written of generated tokens, or not yet."""
    return getattr(vllm_config.speculative_config, "method", None) in (*DRAFTS_OF_TOKENS, *DRAFTS_OF_NEXT_TOKEN)


def draft_ahead(vllm_config: Any) -> int:
    """How many tokens behind a token its KV follows from, of which a draft's is a part. Such a draft reads, at each
    token, the model's hidden state there and the next token."""
    if getattr(vllm_config.speculative_config, "method", None) not in DRAFTS_OF_NEXT_TOKEN:
        return 0
    return int(getattr(vllm_config, "num_prefill_lookahead_tokens", 1))


def _gives_the_next_token(vllm_config: Any) -> bool:
    """Whether drafts are given the prompt's own next token at the end of each part of it. vLLM's first model runner
    takes the last token that is known (`prepare_next_token_ids_padded`), but in batches that are not padded."""
    is_padded = not vllm_config.speculative_config.disable_padded_drafter_batch
    return bool(getattr(vllm_config, "use_v2_model_runner", False)) or not is_padded


def unfilled_groups(vllm_config: Any, kv_cache_config: Any) -> list[int]:
    """Groups whose pages may have bytes that no token of the request writes: what another one left there. Pages of
    several groups lie over each other, and a group may have fewer layers; others are padded, or hold more than K and V;
    a draft model skips steps. Not those of recurrent states: their pages may be written to before the connector hears
    of the step, see `states.Padding`.
    """
    groups = kv_cache_config.kv_cache_groups
    keep_tokens = [at for at in range(len(groups)) if at not in states.recurrent_groups(groups)]
    if len(groups) > 1 or drafts_have_kv(vllm_config):
        return keep_tokens
    return [at for at in keep_tokens if not all(map(_is_filled_by_tokens, states.specs_of(groups[at])))]


def _is_filled_by_tokens(spec: Any) -> bool:
    """Whether the page has no byte more than its tokens' K and V, or latents."""
    of_token = spec.num_kv_heads * (spec.head_size + getattr(spec, "head_size_v", spec.head_size))
    sizes = {spec.block_size * of_token * spec.dtype.itemsize}
    if not hasattr(spec, "head_size_v"):  # of versions that do not say that a latent has no V
        sizes.add(spec.block_size * spec.num_kv_heads * spec.head_size * spec.dtype.itemsize)
    return spec.page_size_bytes in sizes


def check_company(kv_transfer_config: Any) -> None:
    """ConfigError where this connector is one of several, and these are not set up so that it can be right. Asked on
    the worker side, as the engine's own configuration is not told to connectors but set while it starts a worker."""
    engine_config = get_current_vllm_config_or_none()
    outer = engine_config.kv_transfer_config if engine_config is not None else None
    if outer is None or outer is kv_transfer_config:
        return
    names = [each.get("kv_connector") for each in outer.kv_connector_extra_config.get("connectors", ())]
    if names.count("KVLabConnector") > 1:
        raise ConfigError("KVLabConnector stands twice in one engine; give all its tiers to one")
    if outer.kv_connector != kv_transfer_config.kv_connector and outer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            f"inside {outer.kv_connector} a load that fails would end the request: set "
            '"kv_load_failure_policy": "recompute" beside "kv_connector": '
            f'"{outer.kv_connector}"'
        )


def refuse_unserved(vllm_config: Any, *, outlives: bool) -> None:
    """ConfigError for setups whose KV would be named or copied wrongly; `outlives`: stored KV outlives the process."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"{name} must be 1 with KVLabConnector, got {getattr(parallel, name)}")
    if outlives and getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise ConfigError(
            "calculate_kv_scales measures the KV cache's scales again in each process, which would read another's KV "
            "wrongly; turn it off, or give memory:// as the only tier"
        )
    model = vllm_config.model_config
    if getattr(model, "pooler_config", None) is not None and not model.is_prefix_caching_supported:
        raise ConfigError(
            "this pooling model's attention or pooling needs every token computed, so vLLM serves no cached prefix of "
            "it; run it without the connector"
        )
    speculative = vllm_config.speculative_config
    method = getattr(speculative, "method", None)
    served = (*DRAFTS_WITHOUT_KV, *DRAFTS_OF_TOKENS, *DRAFTS_OF_NEXT_TOKEN)
    if speculative is not None and method not in served:
        raise ConfigError(
            f"speculative decoding by {method!r} is not served: its drafts have KV that depends on more than an "
            f"object's key says; take {' or '.join(served)}, or turn one off"
        )
    if draft_ahead(vllm_config) > 1:
        raise ConfigError(
            "several MTP layers in a chain are not served, as the KV of each depends on one token more; set "
            "num_speculative_tokens to 1, which uses the first"
        )
    if method in DRAFTS_OF_NEXT_TOKEN and not _gives_the_next_token(vllm_config):
        raise ConfigError(
            f"where a prompt is computed in parts, this engine's model runner gives {method!r} drafts its last token "
            'for the next one; set "disable_padded_drafter_batch": true in speculative_config'
        )
    if method in DRAFTS_OF_NEXT_TOKEN and getattr(speculative, "parallel_drafting", False):
        raise ConfigError(f"parallel_drafting with {method!r} is not served; turn it off, or run without the connector")


def packing(vllm_config: Any) -> str:
    """What decides the order of bytes inside a page besides the layout's name.

    On a CPU the attention kernel packs pages for the instruction set at hand, so two hosts' pages may differ. On a GPU
    vLLM chooses a backend by the card and by the libraries that are installed.
    """
    backend = str(getattr(vllm_config, "attention_config", None) and vllm_config.attention_config.backend)
    if vllm_config.device_config.device_type != "cpu":
        libraries = [name for name in ("flashinfer", "flash_attn") if find_spec(name) is not None]
        return "/".join([backend, str(current_platform.get_device_capability()), *libraries])
    capability = torch.backends.cpu.get_cpu_capability()
    amx = torch.cpu._is_amx_tile_supported()
    return f"{backend}/{capability}/amx={amx}"


def watch_adapters() -> bool:
    """Let ADAPTERS see which LoRA weights vLLM loads; whether this version can be watched."""
    try:
        from vllm.lora.utils import get_adapter_absolute_path
        from vllm.lora.worker_manager import WorkerLoRAManager
    except ImportError:
        return False
    return watch(WorkerLoRAManager, get_adapter_absolute_path)


def zeroes_pages(kv_cache_config: Any) -> bool:
    """Whether the engine clears new pages, which it does before the connector hears of the step."""
    return bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))


def hit_sources() -> Any | None:
    """vLLM's enumeration of cache hit sources, where it has one."""
    if find_spec("vllm.v1.metrics.cache_hit_source") is None:
        return None
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    return CacheHitSource
