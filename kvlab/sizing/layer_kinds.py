"""Which kind each layer is, from config fields alone.

Kinds: ``full``, ``sliding``, ``chunked``, ``linear`` (a recurrent layer of the family that the fields describe),
``conv``, ``hybrid`` and ``hybrid sliding`` (attention and state side by side), ``cross``, ``none`` (keeps nothing: MLP
or MoE blocks).
"""

from kvlab.errors import ConfigError
from kvlab.sizing.model_config import ModelConfig, context_length, num_layers

_WORDS = {
    "full_attention": "full",
    "attention": "full",
    "global_attention": "full",
    "indexed_attention": "full",
    "deepseek_sparse_attention": "full",
    "sparse_attention": "full",
    "minimax_m3_sparse": "full",
    "sliding_attention": "sliding",
    "local_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba1": "linear",
    "mamba2": "linear",
    "gated_deltanet": "linear",
    "kda": "linear",
    "lightning-attn": "linear",
    "minicpm4": "full",
    "conv": "conv",
    "short_conv": "conv",
    "hybrid": "hybrid",
    "mlp": "none",
    "moe": "none",
}
_CHARS = {"M": "linear", "*": "full", "-": "none", "E": "none"}  # Nemotron-H's hybrid_override_pattern
_WHOLLY = {"falcon_h1": "hybrid", "mamba": "linear", "mamba2": "linear", "falcon_mamba": "linear"}
_REFUSED = {
    "compress_ratios": "its compressed cache (DeepSeek-V4) has no published size that agrees with a measurement",
    "block_types": "its RG-LRU state (RecurrentGemma) is not modelled",
    "_block_types": "its RG-LRU state (RecurrentGemma) is not modelled",
}
_WINDOW = ("sliding_window", "attention_window_size", "sliding_window_size")


def layer_kinds(config: ModelConfig) -> list[str]:
    """One kind per decoder layer; raises ConfigError where the fields do not decide it."""
    for field, reason in _REFUSED.items():
        if config.get(field):
            raise ConfigError(f"cannot size {config.name}: field {field!r} says that {reason}")
    count = num_layers(config)
    kinds = _listed(config, count) or _hybrid(config, count) or _local(config, count) or ["full"] * count
    if len(kinds) != count:
        raise ConfigError(f"cannot size {config.name}: its layer list names {len(kinds)} layers, but it has {count}")
    for i in config.get("cross_attention_layers") or []:
        kinds[i] = "cross"
    return _window_beyond_context(config, kinds)


def _listed(config: ModelConfig, count: int) -> list[str] | None:
    """Kinds that the config lists layer by layer."""
    words = config.get("layer_types", "layers_block_type", "mixer_types") or _block_words(config)
    if words:
        unknown = sorted({str(w) for w in words if w not in _WORDS})
        if unknown:
            raise ConfigError(
                f"cannot size {config.name}: layer type {unknown[0]!r} is not known; known: {', '.join(_WORDS)}"
            )
        kinds = [_WORDS[w] for w in words]
        # Qwen2-style classes list "sliding" only where use_sliding_window is on; hand-written configs may not.
        off = config.fields.get("use_sliding_window") is False
        return ["full" if off and k == "sliding" else k for k in kinds]
    if pattern := config.get("hybrid_override_pattern"):
        return [_CHARS[_known_char(config, c)] for c in pattern]
    if pattern := config.get("hybrid_layer_pattern", "sliding_window_layout"):  # MiMo-V2, SmallThinker: 1 slides
        return ["sliding" if flag else "full" for flag in pattern]
    if flags := config.get("attn_type_list"):  # MiniMax: 1 is softmax attention, 0 is lightning
        return ["full" if flag else "linear" for flag in flags]
    return None


def _block_words(config: ModelConfig) -> list[str] | None:
    """Nemotron-H Puzzle: what each block is stands in the block's own config. Nemotron-NAS has no such word."""
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return None
    return [block["block_type"] for block in blocks] if all("block_type" in block for block in blocks) else None


def window_tokens(config: ModelConfig) -> int:
    """Tokens that a sliding layer keeps."""
    return config.count(*_WINDOW)


def _known_char(config: ModelConfig, char: str) -> str:
    if char not in _CHARS:
        raise ConfigError(f"cannot size {config.name}: hybrid_override_pattern has {char!r}; known: {' '.join(_CHARS)}")
    return char


def _hybrid(config: ModelConfig, count: int) -> list[str] | None:
    """Kinds of models that mix attention with recurrent layers by rule."""
    if raw_config := config.get("linear_attn_config"):  # Kimi Linear: layers counted from 1
        full = {i - 1 for i in raw_config.get("full_attn_layers") or []}
    elif config.get("attn_layer_indices") is not None:  # Bamba
        full = set(config.get("attn_layer_indices"))
    elif config.get("attn_layer_period") is not None:  # Jamba
        period, offset = config.count("attn_layer_period"), config.need("attn_layer_offset")
        full = {i for i in range(count) if i % period == offset}
    elif config.model_type.startswith("bailing") and config.get("layer_group_size") is not None:
        full = _last_of_each_group(config, count)
    elif config.get("global_attn_idx") is not None:  # Hymba: Mamba beside attention in every layer
        wide = set(config.get("global_attn_idx"))
        return ["hybrid" if i in wide else "hybrid sliding" for i in range(count)]
    elif config.get("linear_num_value_heads") is not None or config.get("full_attention_interval") is not None:
        step = config.get("full_attention_interval") or 4  # Qwen3-Next and 3.5: every fourth layer by class default
        full = {i for i in range(count) if (i + 1) % step == 0}
    elif config.get("full_attn_idxs") is not None:  # LFM2
        return ["full" if i in config.get("full_attn_idxs") else "conv" for i in range(count)]
    elif config.get("conv_L_cache") is not None:
        raise config.missing("layer_types", "full_attn_idxs", why="so which layers are convolutions is not known")
    elif config.model_type in _WHOLLY:
        return [_WHOLLY[config.model_type]] * count
    elif config.get("layer_type_counts"):
        raise config.missing("layer_types", why="only counts of layers per type are known")
    else:
        return None
    return ["full" if i in full else "linear" for i in range(count)]


def _last_of_each_group(config: ModelConfig, count: int) -> set[int]:
    """Ling and Ring: the last layer of each group attends; so do layers beyond the last whole group in version 3."""
    size = config.count("layer_group_size")
    whole = count // size * size
    if whole != count and config.get("short_conv_kernel_size") is None:
        raise ConfigError(
            f"cannot size {config.name}: field 'layer_group_size' {size} does not divide {count} layers, and published "
            "code disagrees on what the last ones are"
        )
    return {i for i in range(count) if (i + 1) % size == 0 or i >= whole}


def _local(config: ModelConfig, count: int) -> list[str] | None:
    """Kinds of models that mix full attention with windows or chunks by rule."""
    if config.model_type.startswith("llama4"):
        config.count("attention_chunk_size")
        rope = config.get("no_rope_layers")  # 1: RoPE, local chunks; 0: no RoPE, global
        step = config.get("no_rope_layer_interval") or 4
        flags = rope if rope else [(i + 1) % step != 0 for i in range(count)]
        return ["chunked" if flag else "full" for flag in flags]
    if config.model_type.startswith(("gemma3n", "gemma4")):
        config.need("layer_types", why="so which layers slide is not known")
    if not config.get(*_WINDOW):
        return None
    if config.get("use_sliding_window") is False:
        return None
    if config.get("use_sliding_window"):
        first = config.get("max_window_layers") or 0  # Qwen2: the layers below it keep full attention
        return ["sliding" if i >= first else "full" for i in range(count)]
    if config.get("max_window_layers") is not None:
        return None  # a Qwen-style config without the switch: off by class default
    pattern = config.get("sliding_window_pattern", "_sliding_window_pattern")
    if isinstance(pattern, str):  # EXAONE 4: "LLLG"
        return ["sliding" if pattern[i % len(pattern)] in "Ll" else "full" for i in range(count)]
    default = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4}.get(config.model_type)
    step = pattern or default
    if step is None:
        return ["sliding"] * count  # Mistral v0.1, Phi-3, StarCoder2: every layer
    return ["sliding" if (i + 1) % step else "full" for i in range(count)]


def _window_beyond_context(config: ModelConfig, kinds: list[str]) -> list[str]:
    """Windows that the context never fills are no windows (Phi-3.5: 262144 over 131072)."""
    window, context = config.get(*_WINDOW), context_length(config)
    if "sliding" not in kinds or not isinstance(window, int):
        return kinds
    trained = config.get("litgpt_block_size")  # a port's training length: may be below the true context, never above
    if (context and window >= context) or (not context and trained and window > trained):
        config.note(f"sliding_window {window:,} is never filled within the context: counted as full attention")
        return ["full" if kind == "sliding" else kind for kind in kinds]
    return kinds
