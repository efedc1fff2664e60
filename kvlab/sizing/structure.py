"""Fields that change what a cache holds and that no rule has read: the answer would be wrong and say nothing.

A field's name tells whether it is about the structure of the layers: which kind each is, how often they run, what they
share, which states they keep. `ModelConfig.seen` tells what the rules asked for. What is left over is refused by name,
unless the rules of the model's type were checked against an engine; then `explain()` shows it as an assumption.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import Layer, StateKV
from kvlab.sizing.model_config import ModelConfig

# Which kind a layer is. A list that names each layer's kind settles all of these.
_KIND = re.compile(
    r"(layer|block|mixer|attn|attention)_types?(_list)?$|mixer|_pattern$|_layout$|_(interval|frequency|freq|period)$"
    r"|_every_|_idxs?$|_ind(ices|exes)$|window|sliding|swa|(^|_)(local|global)(_|$)|attention_chunk|hybrid"
    r"|(attn|attention|full|linear|sparse|recurrent|nope|dense)_layers?(_ids)?$"
)
# How often layers run, what they share, what is kept of a token. Nothing else settles these.
_AMOUNT = re.compile(
    r"loop|ut_steps|cycles|recurrences?$|(^|_)(repeat|iterations)|shar(e|ed|ing)(_|$)|reuse|(^|_)cla(_|$)|yoco"
    r"|layer_groups?|group_layers|groups?_size_per_layer|block_configs|compress|_per_layer$|(^|_)kv_|_kv$|num_memory_tokens"
)
# States of fixed size. Settled where some layer keeps one, or where each layer's kind is named.
_STATE = re.compile(r"mamba|(^|_)ssm|conv|lightning|(^|_)linear_(attn|num|key|value|head)|delta|(^|_)kda|rwkv|(^|_)lru")
_ELSEWHERE = frozenset([
    "moe", "expert", "experts", "mlp", "ffn", "feed", "intermediate", "rope", "yarn", "norm", "norms", "layernorm",
    "vision", "image", "audio", "video", "encoder", "dropout", "drop", "init", "initializer", "vocab", "token",
    "loss", "router", "routing", "aux", "bias", "eps", "act", "activation", "quant", "quantization", "logit",
    "logits", "tokenizer", "embed", "embedding", "embeddings", "scale", "scaling", "multiplier", "mtp", "nextn",
    "speculative", "implementation", "kernels", "temperature", "softcap", "softcapping", "lora", "proj",
    "projection", "ple", "laurel", "altup", "sparsity", "bidirectional", "backend", "impl", "dense", "source",
])  # fmt: skip
_SETTLED_BY = (
    "layer_types", "layers_block_type", "mixer_types", "hybrid_override_pattern", "hybrid_layer_pattern",
    "sliding_window_layout", "attn_type_list", "full_attn_idxs", "attn_layer_indices",
)  # fmt: skip
_READ_WHOLE = ("linear_attn_config", "sparse_attention_config")
_PLAIN_WORDS = frozenset([
    "full", "full_attention", "attention", "softmax", "causal", "default", "standard", "mla", "gqa", "mha", "mqa",
    "multihead_attention", "multiquery_attention", "grouped_query_attention", "sdpa", "eager", "flash_attention_2",
])  # fmt: skip
# Named like structure, and not: what the field is instead stands beside it.
_NOT_STRUCTURE = frozenset(
    {
        "head_dim", "kv_channels", "kv_cache_quant_algo", "kv_cache_scheme", "cross_attention_layers",
        "max_window_layers", "use_sliding_window",  # a window's switch, without a window
        "index_topk_freq", "index_topk_pattern",  # read where indexer_types does not say it
        "swa_rope_theta", "global_rope_theta", "local_rope_theta", "rope_local_base_freq",  # rotary bases
        "mamba_proj_bias", "conv_bias", "use_conv_bias",
        "shared_intermediate_size", "n_shared_experts", "share_expert_dim", "n_shared_head",
        "sharding", "tie_word_embeddings",
    }
)  # fmt: skip
# Types whose rules were checked: against a real cache of transformers or vLLM, or a published figure.
KNOWN_TYPES = frozenset([
    "afmoe", "apertus", "arcee", "aria_text", "bailing_hybrid", "bamba", "bitnet", "bloom", "chatglm", "cohere",
    "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_ref", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "diffllama", "doge", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1",
    "falcon_mamba", "flex_olmo", "fuyu", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm",
    "glm4", "glm4_moe", "glm5_next_text", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium",
    "hrm_text", "hy_v3", "hy_v4", "hymba", "hyperclovax", "internlm", "internlm2", "iquestloopcoder", "jais2",
    "jamba", "jetmoe", "kimi_k2", "kimi_linear", "laguna", "lfm2", "lfm2_moe", "llama", "llama4_text",
    "longcat_flash", "mellum", "mimo", "mimo_v2_flash", "minicpm", "minicpm3", "minicpm_sala", "minimax",
    "minimax_m2", "minimax_m3", "minimax_m3_vl_text", "minimax_text_01", "ministral3", "mistral", "mixtral",
    "mllama_text_model", "moshi", "nanochat", "nemotron", "nemotron-nas", "nemotron_h", "nemotron_h_puzzle",
    "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "opt", "orion", "ouro", "phi", "phi-msft", "phi3", "phi3_v",
    "phimoe", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "qwen3_vl_moe_text", "qwen3_vl_text", "qwen4_exp_text", "seed_oss", "smallthinker", "smollm3",
    "solar_open", "stablelm", "starcoder2", "step3p7", "t5", "vaultgemma", "whisper", "zamba2",
])  # fmt: skip


def refuse_unread(config: ModelConfig, layers: list[Layer]) -> None:
    """Raise ConfigError for fields that change the cache and that no rule has read; a note where the type is known."""
    listed = any(config.fields.get(name) for name in _SETTLED_BY)
    has_state = any(isinstance(spec, StateKV) for layer in layers for spec in layer.specs)
    left = [
        name
        for name, value in _named(config.fields)
        if name.rpartition(".")[2] not in config.seen
        and _says_something(value)
        and _is_structure(name, listed, has_state)
    ]
    if not left:
        return
    names = ", ".join(repr(name) for name in sorted(left))
    if config.model_type in KNOWN_TYPES:
        config.note(f"not read: {names}")
        return
    raise ConfigError(
        f"cannot size {config.name}: field {names} may change what the cache holds, and no rule for model_type "
        f"{config.model_type or None!r} reads it; leave it out if it does not"
    )


def _named(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields by name, those of nested attention and cache configs as ``outer.inner``."""
    for name, value in fields.items():
        yield name, value
        if isinstance(value, Mapping) and name not in _READ_WHOLE and re.search(r"attn|attention|cache|kv|ssm", name):
            yield from ((f"{name}.{inner}", nested) for inner, nested in value.items())


def _says_something(value: Any) -> bool:
    """False for what switches a feature off: nothing, zero, once, a negative index."""
    if isinstance(value, str):
        return value.lower() not in _PLAIN_WORDS and bool(value)
    if isinstance(value, int | float):
        return value > 1 or value is True
    return bool(value)


def _is_structure(name: str, listed: bool, has_state: bool) -> bool:
    own = name.rpartition(".")[2].lower()
    if own in _NOT_STRUCTURE or _ELSEWHERE & set(own.split("_")):
        return False
    if _AMOUNT.search(own):
        return True
    if _STATE.search(own):
        return not (listed or has_state)
    return not listed and _KIND.search(own) is not None
