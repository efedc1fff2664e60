"""From config fields to layers: what every layer of any model keeps, decided layer by layer."""

from dataclasses import replace

from kvlab.errors import ConfigError
from kvlab.sizing.class_defaults import ONE_KV_HEAD_PER_HEAD
from kvlab.sizing.facts import MAX_LAYERS, Facts, hidden_size, num_heads
from kvlab.sizing.parts import HeadsKV, IndexerKV, LatentKV, Layer, Part
from kvlab.sizing.patterns import layer_kinds, window_tokens
from kvlab.sizing.recurrent import state_of
from kvlab.sizing.structure import refuse_unread


def build_layers(facts: Facts, *, mtp: bool = False, encoder_tokens: int | None = None) -> list[Layer]:
    """All layers of the model. `mtp` adds its multi-token-prediction layers, which keep KV only when used.

    Raises ConfigError naming the field that is missing or not understood.
    """
    kinds = layer_kinds(facts)
    owners = _kv_owners(facts, kinds)
    layers = [_layer(facts, i, kind, owners[i], encoder_tokens) for i, kind in enumerate(kinds)]
    if facts.get("is_encoder_decoder"):
        layers = [_with_cross(facts, layer, encoder_tokens) for layer in layers]
    layers = _looped(facts, layers)
    refuse_unread(facts, layers)
    if mtp:
        layers += _mtp_layers(facts, layers)
    if not any(layer.parts for layer in layers):
        raise ConfigError(f"cannot size {facts.name}: none of its {len(layers)} layers keeps anything")
    return layers


def _layer(facts: Facts, i: int, kind: str, owner: int, encoder_tokens: int | None) -> Layer:
    if kind == "none":
        return Layer(i, "keeps nothing")
    if owner != i:
        own = (state_of(facts, kind),) if kind.startswith("hybrid") else ()
        return Layer(i, f"shares KV of layer {owner}" + "".join(f" + {state.name}" for state in own), own)
    if kind in ("linear", "conv"):
        state = state_of(facts, kind)
        return Layer(i, state.name, (state,))
    if kind.startswith("hybrid"):
        state, attends = state_of(facts, kind), "sliding" if kind == "hybrid sliding" else "full"
        label = "sliding window" if attends == "sliding" else "full attention"
        return Layer(i, f"{label} + {state.name}", (*_attention(facts, i, attends), state))
    if kind == "cross":
        return Layer(i, "cross-attention", (_cross(facts, encoder_tokens),))
    parts = _attention(facts, i, kind)
    if not parts:
        return Layer(i, "keeps nothing")
    label = {"full": "full attention", "sliding": "sliding window", "chunked": "chunked local"}[kind]
    if isinstance(parts[0], LatentKV):
        label = "MLA" + (" + indexer" if len(parts) > 1 else "")
    elif len(parts) > 1:
        label = "sparse attention + indexer"
    return Layer(i, label, parts)


def _attention(facts: Facts, i: int, kind: str) -> tuple[Part, ...]:
    if facts.get("kv_lora_rank"):  # never head_dim here: DeepSeek-V3's class sets it to the rope width
        latent = LatentKV(facts.count("kv_lora_rank"), facts.count("qk_rope_head_dim", least=0))  # 0: MLA without rope
        return (latent, _indexer(facts)) if _has_indexer(facts, i) else (latent,)
    heads = _kv_heads(facts, i, kind)
    if not heads:
        return ()
    k_dim, v_dim = _head_dims(facts, i, kind)
    window = None
    if kind == "sliding":
        window = window_tokens(facts)
    if kind == "chunked":
        window = facts.count("attention_chunk_size")
    part = HeadsKV(heads, k_dim, v_dim, window=window, chunked=kind == "chunked")
    if facts.get("indexer_head_dim"):  # Qwen 4 Exp: keys of groups of tokens
        width = facts.count("indexer_head_dim") * (facts.get("indexer_kv_heads") or 1)
        return (part, IndexerKV(width, pool=facts.count("indexer_compress_ratio")))
    index_dim = _block_sparse_index_dim(facts, i)
    return (part, IndexerKV(index_dim, packed=False)) if index_dim else (part,)


def _indexer(facts: Facts) -> IndexerKV:
    dim, pool = facts.count("index_head_dim"), facts.get("index_kpool") or 1
    # GLM-5.3: the key, a gate score as wide, and whether the token counts, until its pool is complete
    return IndexerKV(2 * dim + 1, pool=pool) if pool > 1 else IndexerKV(dim)


def _has_indexer(facts: Facts, i: int) -> bool:
    """DeepSeek-V3.2 and GLM-5: an indexer in every layer but those that reuse the mask of an earlier one (GLM-5.2)."""
    if not facts.get("index_head_dim"):
        return False
    if types := facts.get("indexer_types"):
        return bool(types[i] == "full")
    if pattern := facts.get("index_topk_pattern"):
        return pattern[i] in ("F", "full")
    freq, offset = max(facts.get("index_topk_freq") or 1, 1), facts.get("index_skip_topk_offset")
    return max(i - (2 if offset is None else offset) + 1, 0) % freq == 0  # transformers GlmMoeDsaConfig


def _block_sparse_index_dim(facts: Facts, i: int) -> int:
    """Width of layer `i`'s block-selection key (MiniMax-M3), or 0."""
    types = facts.get("layer_types")
    if types and i < len(types) and types[i] == "minimax_m3_sparse":  # as transformers' class names it
        return facts.count("index_head_dim")
    config = facts.get("sparse_attention_config") or {}
    freq = config.get("sparse_attention_freq") or ()
    if config.get("use_sparse_attention") is False or i >= len(freq) or not freq[i]:
        return 0
    return Facts(facts.name, config).count("sparse_index_dim")


def _kv_heads(facts: Facts, i: int, kind: str) -> int:
    """KV heads of layer `i`; 0 where attention was removed."""
    if (overrides := _override(facts, i)) and overrides.get("num_key_value_heads"):
        return int(overrides["num_key_value_heads"])
    if (per_layer := facts.get("n_heads_in_group_per_layer")) is not None:  # Nemotron-NAS, flattened
        return num_heads(facts) // per_layer[i] if per_layer[i] else 0
    if (blocks := facts.get("block_configs")) and (heads := _heads_of_block(facts, blocks[i])) is not None:
        return heads
    if kind == "sliding" and facts.get("swa_num_key_value_heads"):  # MiMo-V2
        return facts.count("swa_num_key_value_heads")
    if kind == "sliding" and facts.model_type == "mimo_v2_flash":  # its class names no field for it
        return 2 * facts.count("num_key_value_heads")
    if kind == "full" and facts.get("num_global_key_value_heads") and facts.get("attention_k_eq_v") is not False:
        return facts.count("num_global_key_value_heads")  # Gemma 4
    if facts.model_type in FALCON:  # its class reads neither num_key_value_heads nor the plain rule
        return _falcon_kv_heads(facts)
    listed = facts.get("num_kv_heads_per_layer", "num_key_value_heads_per_layer")
    heads = listed[i] if listed else facts.get("num_key_value_heads")
    if isinstance(heads, list):  # OpenELM
        return int(heads[i])
    if heads is not None:
        return facts.count("num_key_value_heads") if not listed else int(heads)
    return _kv_heads_by_other_names(facts)


def _heads_of_block(facts: Facts, block: object) -> int | None:
    """KV heads of one entry of block_configs (DeciLM, Nemotron-NAS, Nemotron-H Puzzle); None where it says nothing."""
    attention = block.get("attention") if isinstance(block, dict) else None
    if isinstance(attention, dict):
        if attention.get("no_op") or attention.get("replace_with_linear"):
            return 0
        if attention.get("n_heads_in_group"):
            return num_heads(facts) // int(attention["n_heads_in_group"])
    if isinstance(block, dict) and "block_type" in block:
        heads = block.get("num_key_value_heads")
        return None if heads is None else int(heads)
    raise ConfigError(
        f"cannot size {facts.name}: field 'block_configs' has an entry without block_type and n_heads_in_group"
    )


FALCON = ("falcon", "RefinedWeb", "RefinedWebModel")


def _falcon_kv_heads(facts: Facts) -> int:
    if facts.get("new_decoder_architecture"):
        return int(facts.get("num_kv_heads", "n_head_kv") or num_heads(facts))
    return 1 if facts.get("multi_query") else num_heads(facts)


def _kv_heads_by_other_names(facts: Facts) -> int:
    if facts.get("multi_query") is not None:  # GPT-BigCode
        return 1 if facts.get("multi_query") else num_heads(facts)
    nested = Facts(facts.name, facts.get("attn_config") or {}, seen=facts.seen)  # DBRX, MPT
    if nested.get("kv_n_heads"):
        return nested.count("kv_n_heads")
    for name in ("num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups", "num_query_groups"):
        if facts.get(name) is not None:
            return facts.count(name)
    if facts.model_type in ONE_KV_HEAD_PER_HEAD:
        return num_heads(facts)
    return facts.count("num_key_value_heads", why="and its model_type does not say that it equals the attention heads")


def _head_dims(facts: Facts, i: int, kind: str) -> tuple[int, int]:
    """Widths of K and of V in one head of layer `i`."""
    if (overrides := _override(facts, i)) and overrides.get("head_dim"):
        return int(overrides["head_dim"]), int(overrides["head_dim"])
    if kind == "sliding" and facts.get("swa_head_dim"):
        k_dim = facts.count("swa_head_dim")
        return k_dim, facts.get("swa_v_head_dim") or k_dim
    if kind == "full" and facts.model_type.startswith("gemma4") and "sliding_attention" in facts.get("layer_types"):
        k_dim = facts.get("global_head_dim") or 512  # Gemma4TextConfig's own default
        return k_dim, k_dim
    names = ("head_dim", "attention_head_dim", "kv_channels", "d_kv", "hidden_size_per_head")
    if facts.get(*names) is not None:
        k_dim = facts.count(*names)
    elif "head_dim" in facts.unknown:
        k_dim = facts.count("head_dim", why="and hidden_size / heads is not it")
    else:
        heads, hidden = num_heads(facts), hidden_size(facts)
        if hidden % heads:
            raise ConfigError(
                f"cannot size {facts.name}: field 'head_dim' is missing, and {hidden} / {heads} is no integer"
            )
        k_dim = hidden // heads
        facts.note(f"head_dim is not in the config: hidden_size / heads = {hidden} / {heads} = {k_dim}")
    v_dim = facts.get("v_head_dim")
    return k_dim, v_dim if isinstance(v_dim, int) and v_dim > 0 else k_dim


def _override(facts: Facts, i: int) -> dict[str, int]:
    """transformers' per_layer_config: what layer `i` has of its own (heterogeneous models)."""
    table = facts.get("per_layer_config") or {}
    entry = table.get(i, table.get(str(i))) if isinstance(table, dict) else table[i]
    return dict(entry) if entry else {}


def _kv_owners(facts: Facts, kinds: list[str]) -> list[int]:
    """For each layer the layer whose KV it reads: itself, unless KV is shared across layers."""
    owners = list(range(len(kinds)))
    shared = facts.get("num_kv_shared_layers") or 0  # Gemma 3n and 4: the last ones reuse the last of their kind
    first = len(kinds) - shared
    for i in range(first if first > 0 else len(kinds), len(kinds)):
        earlier = [j for j in range(first) if kinds[j] == kinds[i]]
        if not earlier:
            raise ConfigError(f"cannot size {facts.name}: layer {i} shares KV, but no earlier layer is {kinds[i]!r}")
        owners[i] = earlier[-1]
    factor = facts.get("cla_share_factor") or 1  # cross-layer attention (Hunyuan-Large, arXiv:2405.12981)
    if facts.get("use_cla") is not False and factor > 1:
        owners = [i - i % factor for i in owners]
    for group in facts.get("kv_reuse_group") or ():  # Hymba: the first of a group computes, the others read
        for i in group[1:]:
            owners[i] = group[0]
    return owners


def _looped(facts: Facts, layers: list[Layer]) -> list[Layer]:
    """Models that run their layers several times, each time with KV of its own."""
    if steps := facts.get("total_ut_steps"):  # Ouro
        count = _loops(facts, "total_ut_steps", layers)
        facts.note(f"the layers run {steps} times (total_ut_steps), each time with KV of their own")
        return [replace(x, index=j * len(layers) + x.index) for j in range(count) for x in layers]
    if facts.model_type != "iquestloopcoder":
        return layers
    loops = _loops(facts, "loop_num", layers) if facts.get("loop_num") else 2  # as its class fills it in
    window = facts.count("loop_window_size") if facts.get("loop_window_size") else 64
    facts.note(f"the layers run {loops} times (loop_num); all but the first keep {window} tokens (loop_window_size)")
    again = [
        Layer(j * len(layers) + x.index, "sliding window", tuple(replace(p, window=window) for p in _heads_of(x)))
        for j in range(1, loops)
        for x in layers
    ]
    return layers + again


def _loops(facts: Facts, name: str, layers: list[Layer]) -> int:
    count = facts.count(name)
    if count * len(layers) > MAX_LAYERS:
        raise ConfigError(
            f"cannot size {facts.name}: {name} {count} times {len(layers)} layers is more than any model has"
        )
    return count


def _heads_of(layer: Layer) -> list[HeadsKV]:
    return [part for part in layer.parts if isinstance(part, HeadsKV)]


def _cross(facts: Facts, encoder_tokens: int | None) -> HeadsKV:
    tokens = encoder_tokens if encoder_tokens is not None else facts.get("max_source_positions")
    if tokens is None:
        tokens = 0 if facts.get("cross_attention_layers") else facts.get("n_positions") or 512
        facts.note(f"cross-attention counted for {tokens} encoder tokens; set encoder_tokens")
    k_dim, v_dim = _head_dims(facts, 0, "cross")
    return HeadsKV(_kv_heads(facts, 0, "cross"), k_dim, v_dim, fixed_tokens=int(tokens))


def _with_cross(facts: Facts, layer: Layer, encoder_tokens: int | None) -> Layer:
    return Layer(layer.index, f"{layer.kind} + cross-attention", (*layer.parts, _cross(facts, encoder_tokens)))


def _mtp_layers(facts: Facts, layers: list[Layer]) -> list[Layer]:
    count = facts.get("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers") or 0
    like = next((x for x in reversed(layers) if x.kind.startswith(("full", "MLA", "sparse"))), layers[-1])
    if not count:
        facts.note("mtp asked for, but the config declares no MTP layers")
    return [Layer(len(layers) + j, f"MTP ({like.kind})", like.parts) for j in range(count)]
