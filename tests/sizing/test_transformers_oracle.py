"""transformers as the judge: real caches of tiny random models, layer by layer, after prefill and a decode step."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kvlab.sizing import size_calculator
from kvlab.sizing.cache_specs import spec_bytes

PREFILL = 11  # longer than the windows below, and not a multiple of anything

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **MOE,
}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 32,
    **MOE,
}
MAMBA2 = {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_conv": 4}
S, F, L, C = "sliding_attention", "full_attention", "linear_attention", "chunked_attention"

# family -> (model_type, fields)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "grouped-query": ("qwen2", {}),
    "multi-query": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "head_dim given": ("qwen3", {"head_dim": 24}),
    "gpt-2 names": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128}),
    "experts": ("mixtral", MOE),
    "window in every layer": ("mistral", {"sliding_window": 6}),
    "window alternating": ("gpt_oss", {"head_dim": 16, "sliding_window": 6, "layer_types": [S, F, S, F], **MOE}),
    "window by default pattern": ("gemma3_text", {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 6}),
    "window of gemma 2": ("gemma2", {"head_dim": 16, "sliding_window": 6}),
    "window from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "window switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 2}),
    "chunked local": (
        "llama4_text",
        {"head_dim": 16, "attention_chunk_size": 8, "intermediate_size_mlp": 96, "layer_types": [C, C, C, F], **MOE},
    ),
    "heads differ by layer": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 6,
            "layer_types": [S, S, S, F],
            "hidden_size_per_layer_input": 0,
        },
    ),
    "shared across layers": (
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": [S, F, S, F, S, F],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 6,
        },
    ),
    "latent": ("deepseek_v3", MLA),
    "latent with indexer": ("deepseek_v32", {**MLA, "index_head_dim": 40, "index_n_heads": 2, "index_topk": 4}),
    "latent, indexer shared": (
        "glm_moe_dsa",
        {
            **MLA,
            "index_head_dim": 40,
            "index_n_heads": 2,
            "index_topk": 4,
            "indexer_types": ["full", "shared", "full", "shared"],
        },
    ),
    "two attentions a layer": (
        "longcat_flash",
        {k: v for k, v in MLA.items() if k not in ("first_k_dense_replace", "n_group", "topk_group", *MOE)}
        | {
            "num_layers": 2,
            "head_dim": 8,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 1,
        },
    ),
    "twice the heads where it slides": (
        "mimo_v2_flash",
        {
            "head_dim": 16,
            "v_head_dim": 8,
            "sliding_window": 6,
            "layer_types": [F, S, S, F],
            "mlp_layer_types": ["dense"] * 4,
            "n_group": 1,
            "topk_group": 1,
            **MOE,
        },
    ),
    "gated delta net": ("qwen3_next", {**DELTA, "layer_types": [L, L, L, F]}),
    "gated delta net 3.5": ("qwen3_5_text", {**DELTA, "layer_types": [L, L, L, F]}),
    "mamba-2 hybrid": ("bamba", {**MAMBA2, "attn_layer_indices": [1], "mamba_expand": 2}),
    "mamba-2 beside attention": ("falcon_h1", {**MAMBA2, "head_dim": 16, "mamba_d_ssm": 128, "mamba_expand": 2}),
    "mamba-1 hybrid": (
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "use_mamba_kernels": False,
            **MOE,
        },
    ),
    "mamba-1 alone": ("falcon_mamba", {"state_size": 8, "conv_kernel": 4, "expand": 2, "intermediate_size": 128}),
    "mamba-2 of nemotron": (
        "nemotron_h",
        {
            "hybrid_override_pattern": "M-*M",
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "conv_kernel": 4,
        },
    ),
    "delta attention beside latents": (
        "kimi_linear",
        {
            **MLA,
            "q_lora_rank": None,
            "linear_attn_config": {
                "full_attn_layers": [4],
                "kda_layers": [1, 2, 3],
                "head_dim": 16,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
        },
    ),
    "block-sparse index": (
        "minimax_m3_vl_text",
        {
            "head_dim": 16,
            "rotary_dim": 8,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 32,
            "index_head_dim": 24,
            "index_n_heads": 2,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "sparse_attention_config": {"sparse_attention_freq": [0, 0, 1, 1], "sparse_index_dim": 24},
            **MOE,
        },
    ),
    "short convolution": ("lfm2", {"layer_types": ["conv", "conv", F, "conv"], "conv_L_cache": 3, "block_ff_dim": 96}),
    "lightning": ("minimax", {"head_dim": 16, "layer_types": [L, F, L, F], "block_size": 4, **MOE}),
}


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _layer_bytes(layer: Any) -> int:
    """Bytes of every tensor that the cache layer's state consists of."""
    names = ("keys", "values", "indexer_keys", "idx_keys", "conv_states", "recurrent_states")
    return sum(t.numel() * t.element_size() for n in names for t in _tensors(getattr(layer, n, None)))


def _measure(model: Any, cache: Any, **inputs: Any) -> tuple[list[int], Any]:
    name = "cache_params" if model.config.model_type == "falcon_mamba" else "past_key_values"
    with torch.no_grad():
        cache = getattr(model(**inputs, **{name: cache}, use_cache=True), name)
    return _cache_bytes(cache), cache


def _cache_bytes(cache: Any) -> list[int]:
    if hasattr(cache, "cross_attention_cache"):
        halves = (_cache_bytes(cache.self_attention_cache), _cache_bytes(cache.cross_attention_cache))
        return [own + cross for own, cross in zip(*halves, strict=True)]
    sizes = [_layer_bytes(layer) for layer in cache.layers]
    for i, state in enumerate(getattr(cache, "linear_cache", [])):  # MiniMax keeps its states beside the layers
        sizes += [0] * (i + 1 - len(sizes))
        sizes[i] += sum(t.numel() * t.element_size() for t in _tensors(state))
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_cache_of_a_tiny_model_has_exactly_our_bytes(family: str, dtype: torch.dtype) -> None:
    model_type, fields = FAMILIES[family]
    base = {} if model_type == "gpt2" else BASE
    config = transformers.CONFIG_MAPPING[model_type](**{**base, **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    size = size_calculator(model.config, dtype=str(dtype), engine="transformers")
    tokens = torch.arange(3, 3 + PREFILL)[None]
    after_prefill, cache = _measure(model, None, input_ids=tokens)
    after_decode, _ = _measure(model, cache, input_ids=tokens[:, :1])
    for n, measured in ((PREFILL, after_prefill), (PREFILL + 1, after_decode)):
        ours = [sum(spec_bytes(spec, n, size.conventions) for spec in layer.specs) for layer in size.layers]
        measured += [0] * (len(ours) - len(measured))  # layers that share KV may have no slot of their own
        assert ours == measured
        assert size.at(n) == sum(measured)


def test_cache_of_a_tiny_t5() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=12, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4, vocab_size=97
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    source, target = torch.arange(3, 20)[None], torch.arange(3, 8)[None]
    prefill, cache = _measure(model, None, input_ids=source, decoder_input_ids=target)
    decode, _ = _measure(model, cache, input_ids=source, decoder_input_ids=target[:, :1])
    size = size_calculator(model.config, "fp32", engine="transformers", encoder_tokens=source.shape[1])
    assert [size.at(5), size.at(6)] == [sum(prefill), sum(decode)]
    assert [row["fixed_bytes"] for row in size.per_layer()] == [2 * 4 * 12 * 4 * source.shape[1]] * 2


def test_cache_of_a_tiny_whisper() -> None:
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=4,
        num_mel_bins=8, max_source_positions=20, max_target_positions=16, vocab_size=97, decoder_start_token_id=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    sound, target = torch.randn(1, 8, 40), torch.arange(3, 8)[None]
    prefill, cache = _measure(model, None, input_features=sound, decoder_input_ids=target)
    decode, _ = _measure(model, cache, input_features=sound, decoder_input_ids=target[:, :1])
    size = size_calculator(model.config, "fp32", engine="transformers")
    assert [size.at(5), size.at(6)] == [sum(prefill), sum(decode)]
