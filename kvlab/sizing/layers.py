"""From config fields to layers: what every layer of any model keeps, decided layer by layer."""

from dataclasses import replace

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import CacheSpec, HeadsKV, IndexerKV, LatentKV, Layer
from kvlab.sizing.class_defaults import ONE_KV_HEAD_PER_HEAD
from kvlab.sizing.layer_kinds import layer_kinds, window_tokens
from kvlab.sizing.model_config import MAX_LAYERS, ModelConfig, hidden_size, num_heads
from kvlab.sizing.recurrent import state_of
from kvlab.sizing.structure import refuse_unread


def build_layers(config: ModelConfig, *, mtp: bool = False, encoder_tokens: int | None = None) -> list[Layer]:
    """All layers of the model. `mtp` adds its multi-token-prediction layers, which keep KV only when used.

    Raises ConfigError naming the field that is missing or not understood.
    """
    kinds = layer_kinds(config)
    owners = _kv_owners(config, kinds)
    layers = [_layer(config, i, kind, owners[i], encoder_tokens) for i, kind in enumerate(kinds)]
    if config.get("is_encoder_decoder"):
        layers = [_with_cross(config, layer, encoder_tokens) for layer in layers]
    layers = _looped(config, layers)
    refuse_unread(config, layers)
    if mtp:
        layers += _mtp_layers(config, layers)
    if not any(layer.specs for layer in layers):
        raise ConfigError(f"cannot size {config.name}: none of its {len(layers)} layers keeps anything")
    return layers


def _layer(config: ModelConfig, i: int, kind: str, owner: int, encoder_tokens: int | None) -> Layer:
    if kind == "none":
        return Layer(i, "keeps nothing")
    if owner != i:
        own = (state_of(config, kind),) if kind.startswith("hybrid") else ()
        return Layer(i, f"shares KV of layer {owner}" + "".join(f" + {state.name}" for state in own), own)
    if kind in ("linear", "conv"):
        state = state_of(config, kind)
        return Layer(i, state.name, (state,))
    if kind.startswith("hybrid"):
        state, attends = state_of(config, kind), "sliding" if kind == "hybrid sliding" else "full"
        label = "sliding window" if attends == "sliding" else "full attention"
        return Layer(i, f"{label} + {state.name}", (*_attention(config, i, attends), state))
    if kind == "cross":
        return Layer(i, "cross-attention", (_cross(config, encoder_tokens),))
    specs = _attention(config, i, kind)
    if not specs:
        return Layer(i, "keeps nothing")
    label = {"full": "full attention", "sliding": "sliding window", "chunked": "chunked local"}[kind]
    if isinstance(specs[0], LatentKV):
        label = "MLA" + (" + indexer" if len(specs) > 1 else "")
    elif len(specs) > 1:
        label = "sparse attention + indexer"
    return Layer(i, label, specs)


def _attention(config: ModelConfig, i: int, kind: str) -> tuple[CacheSpec, ...]:
    if config.get("kv_lora_rank"):  # never head_dim here: DeepSeek-V3's class sets it to the rope width
        latent = LatentKV(
            config.count("kv_lora_rank"), config.count("qk_rope_head_dim", least=0)
        )  # 0: MLA without rope
        return (latent, _indexer(config)) if _has_indexer(config, i) else (latent,)
    heads = _kv_heads(config, i, kind)
    if not heads:
        return ()
    k_dim, v_dim = _head_dims(config, i, kind)
    window = None
    if kind == "sliding":
        window = window_tokens(config)
    if kind == "chunked":
        window = config.count("attention_chunk_size")
    spec = HeadsKV(heads, k_dim, v_dim, window=window, chunked=kind == "chunked")
    if config.get("indexer_head_dim"):  # Qwen 4 Exp: keys of groups of tokens
        width = config.count("indexer_head_dim") * (config.get("indexer_kv_heads") or 1)
        return (spec, IndexerKV(width, pool=config.count("indexer_compress_ratio")))
    index_dim = _block_sparse_index_dim(config, i)
    return (spec, IndexerKV(index_dim, packed=False)) if index_dim else (spec,)


def _indexer(config: ModelConfig) -> IndexerKV:
    dim, pool = config.count("index_head_dim"), config.get("index_kpool") or 1
    # GLM-5.3: the key, a gate score as wide, and whether the token counts, until its pool is complete
    return IndexerKV(2 * dim + 1, pool=pool) if pool > 1 else IndexerKV(dim)


def _has_indexer(config: ModelConfig, i: int) -> bool:
    """DeepSeek-V3.2 and GLM-5: an indexer in every layer but those that reuse the mask of an earlier one (GLM-5.2)."""
    if not config.get("index_head_dim"):
        return False
    if types := config.get("indexer_types"):
        return bool(types[i] == "full")
    if pattern := config.get("index_topk_pattern"):
        return pattern[i] in ("F", "full")
    freq, offset = max(config.get("index_topk_freq") or 1, 1), config.get("index_skip_topk_offset")
    return max(i - (2 if offset is None else offset) + 1, 0) % freq == 0  # transformers GlmMoeDsaConfig


def _block_sparse_index_dim(config: ModelConfig, i: int) -> int:
    """Width of layer `i`'s block-selection key (MiniMax-M3), or 0."""
    types = config.get("layer_types")
    if types and i < len(types) and types[i] == "minimax_m3_sparse":  # as transformers' class names it
        return config.count("index_head_dim")
    raw_config = config.get("sparse_attention_config") or {}
    freq = raw_config.get("sparse_attention_freq") or ()
    if raw_config.get("use_sparse_attention") is False or i >= len(freq) or not freq[i]:
        return 0
    return ModelConfig(config.name, raw_config).count("sparse_index_dim")


def _kv_heads(config: ModelConfig, i: int, kind: str) -> int:
    """KV heads of layer `i`; 0 where attention was removed."""
    if (overrides := _override(config, i)) and overrides.get("num_key_value_heads"):
        return int(overrides["num_key_value_heads"])
    if (per_layer := config.get("n_heads_in_group_per_layer")) is not None:  # Nemotron-NAS, flattened
        return num_heads(config) // per_layer[i] if per_layer[i] else 0
    if (blocks := config.get("block_configs")) and (heads := _heads_of_block(config, blocks[i])) is not None:
        return heads
    if kind == "sliding" and config.get("swa_num_key_value_heads"):  # MiMo-V2
        return config.count("swa_num_key_value_heads")
    if kind == "sliding" and config.model_type == "mimo_v2_flash":  # its class names no field for it
        return 2 * config.count("num_key_value_heads")
    if kind == "full" and config.get("num_global_key_value_heads") and config.get("attention_k_eq_v") is not False:
        return config.count("num_global_key_value_heads")  # Gemma 4
    if config.model_type in FALCON:  # its class reads neither num_key_value_heads nor the plain rule
        return _falcon_kv_heads(config)
    listed = config.get("num_kv_heads_per_layer", "num_key_value_heads_per_layer")
    heads = listed[i] if listed else config.get("num_key_value_heads")
    if isinstance(heads, list):  # OpenELM
        return int(heads[i])
    if heads is not None:
        return config.count("num_key_value_heads") if not listed else int(heads)
    return _kv_heads_by_other_names(config)


def _heads_of_block(config: ModelConfig, block: object) -> int | None:
    """KV heads of one entry of block_configs (DeciLM, Nemotron-NAS, Nemotron-H Puzzle); None where it says nothing."""
    attention = block.get("attention") if isinstance(block, dict) else None
    if isinstance(attention, dict):
        if attention.get("no_op") or attention.get("replace_with_linear"):
            return 0
        if attention.get("n_heads_in_group"):
            return num_heads(config) // int(attention["n_heads_in_group"])
    if isinstance(block, dict) and "block_type" in block:
        heads = block.get("num_key_value_heads")
        return None if heads is None else int(heads)
    raise ConfigError(
        f"cannot size {config.name}: field 'block_configs' has an entry without block_type and n_heads_in_group"
    )


FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")


def _falcon_kv_heads(config: ModelConfig) -> int:
    if config.get("new_decoder_architecture"):
        return int(config.get("num_kv_heads", "n_head_kv") or num_heads(config))
    return 1 if config.get("multi_query") else num_heads(config)


def _kv_heads_by_other_names(config: ModelConfig) -> int:
    if config.get("multi_query") is not None:  # GPT-BigCode
        return 1 if config.get("multi_query") else num_heads(config)
    nested = ModelConfig(config.name, config.get("attn_config") or {}, seen=config.seen)  # DBRX, MPT
    if nested.get("kv_n_heads"):
        return nested.count("kv_n_heads")
    for name in ("num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups", "num_query_groups"):
        if config.get(name) is not None:
            return config.count(name)
    if config.model_type in ONE_KV_HEAD_PER_HEAD:
        return num_heads(config)
    return config.count("num_key_value_heads", why="and its model_type does not say that it equals the attention heads")


def _head_dims(config: ModelConfig, i: int, kind: str) -> tuple[int, int]:
    """Widths of K and of V in one head of layer `i`."""
    if (overrides := _override(config, i)) and overrides.get("head_dim"):
        return int(overrides["head_dim"]), int(overrides["head_dim"])
    if kind == "sliding" and config.get("swa_head_dim"):
        k_dim = config.count("swa_head_dim")
        return k_dim, config.get("swa_v_head_dim") or k_dim
    if kind == "full" and config.model_type.startswith("gemma4") and "sliding_attention" in config.get("layer_types"):
        k_dim = config.get("global_head_dim") or 512  # Gemma4TextConfig's own default
        return k_dim, k_dim
    names = ("head_dim", "attention_head_dim", "kv_channels", "d_kv", "hidden_size_per_head")
    if config.get(*names) is not None:
        k_dim = config.count(*names)
    elif "head_dim" in config.unknown:
        k_dim = config.count("head_dim", why="and hidden_size / heads is not it")
    else:
        heads, hidden = num_heads(config), hidden_size(config)
        if hidden % heads:
            raise ConfigError(
                f"cannot size {config.name}: field 'head_dim' is missing, and {hidden} / {heads} is no integer"
            )
        k_dim = hidden // heads
        config.note(f"head_dim is not in the config: hidden_size / heads = {hidden} / {heads} = {k_dim}")
    v_dim = config.get("v_head_dim")
    return k_dim, v_dim if isinstance(v_dim, int) and v_dim > 0 else k_dim


def _override(config: ModelConfig, i: int) -> dict[str, int]:
    """transformers' per_layer_config: what layer `i` has of its own (heterogeneous models)."""
    table = config.get("per_layer_config") or {}
    entry = table.get(i, table.get(str(i))) if isinstance(table, dict) else table[i]
    return dict(entry) if entry else {}


def _kv_owners(config: ModelConfig, kinds: list[str]) -> list[int]:
    """For each layer the layer whose KV it reads: itself, unless KV is shared across layers."""
    owners = list(range(len(kinds)))
    shared = config.get("num_kv_shared_layers") or 0  # Gemma 3n and 4: the last ones reuse the last of their kind
    first = len(kinds) - shared
    for i in range(first if first > 0 else len(kinds), len(kinds)):
        earlier = [j for j in range(first) if kinds[j] == kinds[i]]
        if not earlier:
            raise ConfigError(f"cannot size {config.name}: layer {i} shares KV, but no earlier layer is {kinds[i]!r}")
        owners[i] = earlier[-1]
    factor = config.get("cla_share_factor") or 1  # cross-layer attention (Hunyuan-Large, arXiv:2405.12981)
    if config.get("use_cla") is not False and factor > 1:
        owners = [i - i % factor for i in owners]
    for group in config.get("kv_reuse_group") or ():  # Hymba: the first of a group computes, the others read
        for i in group[1:]:
            owners[i] = group[0]
    return owners


def _looped(config: ModelConfig, layers: list[Layer]) -> list[Layer]:
    """Models that run their layers several times, each time with KV of its own."""
    if steps := config.get("total_ut_steps"):  # Ouro
        count = _loops(config, "total_ut_steps", layers)
        config.note(f"the layers run {steps} times (total_ut_steps), each time with KV of their own")
        return [replace(x, index=j * len(layers) + x.index) for j in range(count) for x in layers]
    if config.model_type != "iquestloopcoder":
        return layers
    loops = _loops(config, "loop_num", layers) if config.get("loop_num") else 2  # as its class fills it in
    window = config.count("loop_window_size") if config.get("loop_window_size") else 64
    config.note(f"the layers run {loops} times (loop_num); all but the first keep {window} tokens (loop_window_size)")
    again = [
        Layer(j * len(layers) + x.index, "sliding window", tuple(replace(p, window=window) for p in _heads_of(x)))
        for j in range(1, loops)
        for x in layers
    ]
    return layers + again


def _loops(config: ModelConfig, name: str, layers: list[Layer]) -> int:
    count = config.count(name)
    if count * len(layers) > MAX_LAYERS:
        raise ConfigError(
            f"cannot size {config.name}: {name} {count} times {len(layers)} layers is more than any model has"
        )
    return count


def _heads_of(layer: Layer) -> list[HeadsKV]:
    return [spec for spec in layer.specs if isinstance(spec, HeadsKV)]


def _cross(config: ModelConfig, encoder_tokens: int | None) -> HeadsKV:
    tokens = encoder_tokens if encoder_tokens is not None else config.get("max_source_positions")
    if tokens is None:
        tokens = 0 if config.get("cross_attention_layers") else config.get("n_positions") or 512
        config.note(f"cross-attention counted for {tokens} encoder tokens; set encoder_tokens")
    k_dim, v_dim = _head_dims(config, 0, "cross")
    return HeadsKV(_kv_heads(config, 0, "cross"), k_dim, v_dim, fixed_tokens=int(tokens))


def _with_cross(config: ModelConfig, layer: Layer, encoder_tokens: int | None) -> Layer:
    return Layer(layer.index, f"{layer.kind} + cross-attention", (*layer.specs, _cross(config, encoder_tokens)))


def _mtp_layers(config: ModelConfig, layers: list[Layer]) -> list[Layer]:
    count = config.get("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers") or 0
    like = next((x for x in reversed(layers) if x.kind.startswith(("full", "MLA", "sparse"))), layers[-1])
    if not count:
        config.note("mtp asked for, but the config declares no MTP layers")
    return [Layer(len(layers) + j, f"MTP ({like.kind})", like.specs) for j in range(count)]
