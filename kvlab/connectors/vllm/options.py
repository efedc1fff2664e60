"""What vLLM was told at its start that may change KV, besides the model's files.

vLLM derives more from its options than it says: a LongRoPE model takes other factors where ``--max-model-len`` lies
beyond its original length, and Llama 4 scales its queries. So every option of the model is taken for one that changes
KV, but for those listed here, which do not: an option that a later version adds costs a miss at most.
"""

import dataclasses
import re
from typing import Any

# Where things lie, what they are called, and what happens before the first or after the last layer.
MODEL_OPTIONS_WITHOUT_EFFECT = {
    "model", "model_weights", "tokenizer", "tokenizer_mode", "tokenizer_revision", "revision", "code_revision",
    "hf_config_path", "hf_token", "served_model_name", "trust_remote_code", "skip_tokenizer_init", "config_format",
    "is_submodel_config", "word_embeddings_untied_by_checkpoint", "allow_deprecated_quantization",
    "allowed_local_media_path", "allowed_media_domains", "seed", "enforce_eager", "max_logprobs", "logprobs_mode",
    "return_sampling_mask", "use_fp64_gumbel", "enable_trace_replay", "generation_config",
    "override_generation_config", "logits_processors", "logits_processor_pattern", "io_processor_plugin",
    "enable_sleep_mode", "sleep_preserve_parameter_names", "sleep_mode_backend", "sleep_mode_offload_cudagraph",
    "enable_nccl_comm_suspend", "enable_cumem_allocator", "renderer_num_workers", "spec_target_max_model_len",
    "max_seq_len_to_capture", "disable_cascade_attn", "pooler_config", "hf_config", "hf_text_config",
    "hf_overrides", "multimodal_config", "encoder_config", "original_max_model_len",
}  # fmt: skip
CACHE_OPTIONS = ("sliding_window", "kv_cache_dtype_skip_layers", "kv_sharing_fast_prefill", "swa_bounded_replay")
MULTIMODAL_OPTIONS = (
    "mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate", "language_model_only", "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path", "mm_device_do_normalize", "mm_encoder_only",
)  # fmt: skip
LOAD_OPTIONS = ("load_format", "ignore_patterns", "model_loader_extra_config")  # which of a folder's weights are read
# How many adapters fit, and how they are computed. Their dtype is part of an adapter's digest.
LORA_OPTIONS_WITHOUT_EFFECT = {
    "max_lora_rank", "max_loras", "max_cpu_loras", "fully_sharded_loras", "specialize_active_lora", "lora_dtype",
}  # fmt: skip


def options_that_change_kv(vllm_config: Any) -> dict[str, str]:
    """Options by name, those at vLLM's defaults left out; ``max_model_len`` always."""
    model = vllm_config.model_config
    found = {f"model.{name}": value for name, value in _not_default(model) if name not in MODEL_OPTIONS_WITHOUT_EFFECT}
    found["model.max_model_len"] = model.max_model_len
    found |= {f"cache.{name}": value for name, value in _not_default(vllm_config.cache_config) if name in CACHE_OPTIONS}
    attention = getattr(vllm_config, "attention_config", None)
    if attention is not None:
        found |= {f"attention.{name}": value for name, value in _not_default(attention)}
    found |= {f"load.{name}": value for name, value in _not_default(vllm_config.load_config) if name in LOAD_OPTIONS}
    lora = getattr(vllm_config, "lora_config", None)
    if lora is not None:
        given = _not_default(lora)
        found |= {f"lora.{name}": value for name, value in given if name not in LORA_OPTIONS_WITHOUT_EFFECT}
    if additional := getattr(vllm_config, "additional_config", None):
        found["additional_config"] = additional
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is not None:
        found |= {f"multimodal.{name}": getattr(multimodal, name, None) for name in MULTIMODAL_OPTIONS}
    return {name: _text(value) for name, value in found.items()}


def _not_default(config: Any) -> list[tuple[str, Any]]:
    """The fields of a config that were given, or worked out, at start."""
    found: list[tuple[str, Any]] = []
    for option in dataclasses.fields(config):
        value = getattr(config, option.name, None)
        default = option.default
        if option.default_factory is not dataclasses.MISSING:
            default = option.default_factory()
        if value != default and not (value is None or value in ({}, [], "")):
            found.append((option.name, value))
    return found


def _text(value: Any) -> str:
    """The same for the same value in another process."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return (
            "["
            + ", ".join(sorted(map(_text, value)) if isinstance(value, set | frozenset) else map(_text, value))
            + "]"
        )
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _text({field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)})
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
