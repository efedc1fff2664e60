"""Fields that change what a cache holds: read and right, or refused by name. Right values stand beside each."""

from contextlib import suppress
from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.sizing import size_calculator
from kvlab.sizing.catalog import catalog

MLA = (512 + 64) * 2  # bytes per token and layer of a latent with its rotary part, bf16


def kda(heads: int, dim: int, kernel: int) -> int:
    """vLLM's kda_state_shape: kernel - 1 columns of q, k and v in bf16, and a matrix per head in fp32."""
    return (kernel - 1) * 3 * heads * dim * 2 + heads * dim * dim * 4


LING = {
    "model_type": "bailing_hybrid", "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 128,
    "kv_lora_rank": 512, "short_conv_kernel_size": 4, "no_kda_lora": True, "kda_safe_gate": True,
    "num_experts_per_tok": 8, "torch_dtype": "bfloat16",
}  # fmt: skip
NEMOTRON = {
    "model_type": "nemotron_h_puzzle", "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 4, "ssm_state_size": 128,
    "conv_kernel": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
HYMBA = {
    "model_type": "hymba", "num_hidden_layers": 32, "hidden_size": 1600, "num_attention_heads": 25,
    "num_key_value_heads": 5, "global_attn_idx": [0, 15, 31], "sliding_window": 1024, "mamba_d_state": 16,
    "mamba_d_conv": 4, "mamba_expand": 2, "kv_reuse_every_i_layer": -1, "torch_dtype": "bfloat16",
}  # fmt: skip
HYMBA_STATES = 32 * (3 * 3200 * 2 + 3200 * 16 * 4)
HYMBA_GROUPS = [[i, i + 1] for i in range(1, 15, 2)] + [[16, 17, 18]] + [[i, i + 1] for i in range(19, 31, 2)]

# name: (fields, growing bytes per token, {window: bytes per token}, fixed bytes)
MODELS: dict[str, tuple[dict[str, Any], int, dict[int, int], int]] = {
    "Ling-3.0-flash": (  # MLA in layers 5, 11, ..., 41
        {**LING, "num_hidden_layers": 42, "hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 32,
         "layer_group_size": 6},
        7 * MLA, {}, 35 * kda(32, 128, 4),
    ),
    "Ling-3.0-tiny": (
        {**LING, "num_hidden_layers": 24, "hidden_size": 1536, "num_attention_heads": 16, "num_key_value_heads": 16,
         "layer_group_size": 4},
        6 * MLA, {}, 18 * kda(16, 128, 4),
    ),
    "Ling 3 with layers beyond the last whole group": (  # vLLM's _is_kda_layer: those attend
        {**LING, "num_hidden_layers": 26, "hidden_size": 1536, "num_attention_heads": 16, "num_key_value_heads": 16,
         "layer_group_size": 4},
        8 * MLA, {}, 18 * kda(16, 128, 4),
    ),
    "Ring-2.5: lightning attention": (  # a matrix per head in the model's dtype
        {**LING, "short_conv_kernel_size": None, "num_hidden_layers": 16, "hidden_size": 1024, "num_attention_heads": 8,
         "num_key_value_heads": 8, "layer_group_size": 8},
        2 * MLA, {}, 14 * 8 * 128 * 128 * 2,
    ),
    "LongCat-Flash": (  # two attention sublayers in each of 28 layers
        {"model_type": "longcat_flash", "hidden_size": 6144, "num_layers": 28, "num_attention_heads": 64,
         "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
         "attention_method": "MLA", "moe_topk": 12, "torch_dtype": "bfloat16"},
        56 * MLA, {}, 0,
    ),
    "MiniCPM-SALA": (  # 8 layers with 2 KV heads; 24 with a matrix per head in fp32
        {"model_type": "minicpm_sala", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 2, "head_dim": 128, "lightning_nh": 32, "lightning_nkv": 32, "lightning_head_dim": 128,
         "mixer_types": ["minicpm4" if i % 4 == 0 else "lightning-attn" for i in range(32)], "torch_dtype": "bfloat16"},
        8 * 2 * 2 * 128 * 2, {}, 24 * 32 * 128 * 128 * 4,
    ),
    "Ouro-2.6B": (  # four loops keep their own KV
        {"model_type": "ouro", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
         "num_key_value_heads": 16, "head_dim": 128, "total_ut_steps": 4, "torch_dtype": "bfloat16"},
        4 * 48 * 2 * 16 * 128 * 2, {}, 0,
    ),
    "IQuest-Coder-V1-40B-Loop": (  # the second loop sees 64 tokens
        {"model_type": "iquestloopcoder", "head_dim": 128, "hidden_size": 5120, "loop_num": 2, "loop_window_size": 64,
         "num_attention_heads": 40, "num_hidden_layers": 80, "num_key_value_heads": 8, "torch_dtype": "bfloat16"},
        80 * 4096, {64: 80 * 4096}, 0,
    ),
    "SmallThinker-21BA3B": (  # 13 of 52 layers attend to all
        {"model_type": "smallthinker", "hidden_size": 2560, "num_hidden_layers": 52, "num_attention_heads": 28,
         "num_key_value_heads": 4, "head_dim": 128, "sliding_window_size": 4096, "max_position_embeddings": 16384,
         "sliding_window_layout": [0, 1, 1, 1] * 13, "rope_layout": [0, 1, 1, 1] * 13, "torch_dtype": "bfloat16"},
        26_624, {4096: 79_872}, 0,
    ),
    "Hymba without sharing": (HYMBA, 3_840, {1024: 37_120}, HYMBA_STATES),
    "Hymba-1.5B": (  # of each group the first layer alone keeps KV; all keep their states
        {**HYMBA, "kv_reuse_group": HYMBA_GROUPS}, 3_840, {1024: 14 * 1_280}, HYMBA_STATES,
    ),
    "Nemotron-H Puzzle": (
        {**NEMOTRON, "block_configs": [{"block_type": t} for t in ("mamba", "moe", "attention", "mamba", "moe")]},
        1_024, {}, 2 * (3 * (1024 + 2 * 4 * 128) * 2 + 16 * 64 * 128 * 4),
    ),
    "MiMo-V2 by its class": (  # twice the KV heads where it slides
        {"model_type": "mimo_v2_flash", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 16, "v_head_dim": 16, "sliding_window": 6, "torch_dtype": "bfloat16",
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]},
        128, {6: 3 * 256}, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_published_structure_is_read(name: str) -> None:
    fields, growing, windows, fixed = MODELS[name]
    size = size_calculator(fields)
    assert (size.growing_bytes, size.windows, size.fixed_bytes) == (growing, windows, fixed)


def test_latents_without_a_rotary_part() -> None:
    """GLM-5.3: qk_rope_head_dim 0. transformers keeps key, gate score and a flag of each token for its indexer."""
    text = {
        "model_type": "glm5_next_text", "num_hidden_layers": 45, "hidden_size": 4096, "num_attention_heads": 64,
        "num_key_value_heads": 64, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 256, "v_head_dim": 256, "index_head_dim": 128, "index_n_heads": 32, "index_kpool": 16,
        "layer_types": ["indexed_attention" if i % 4 == 3 or i == 44 else "linear_attention" for i in range(45)],
        "linear_num_heads": 64, "linear_head_dim": 128, "linear_conv_kernel_dim": 4, "dtype": "bfloat16",
    }  # fmt: skip
    config = {"model_type": "glm5_next", "text_config": text}
    size = size_calculator(config, engine="transformers")
    assert size.growing_bytes == 12 * (512 * 2 + (2 * 128 + 1) * 2)
    assert size.fixed_bytes == 33 * (4 * 3 * 64 * 128 * 2 + 64 * 128 * 128 * 4)
    with pytest.raises(ConfigError, match="field 'index_kpool'"):  # vLLM keeps a key per pool: not modelled
        size_calculator(config)
    without = {**text, "index_head_dim": None, "index_kpool": None}
    assert size_calculator(without).growing_bytes == 12 * 512 * 2


PLAIN = {
    "model_type": "never_seen", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 32_768,
    "torch_dtype": "bfloat16",
}  # fmt: skip
UNREAD: dict[str, Any] = {
    "layer_group_size": 6,
    "loop_num": 2,
    "num_loops": 3,
    "recurrence_steps_cycles": 4,
    "num_recurrences": 4,
    "attention_pattern": "LLG",
    "global_attn_every_n_layers": 4,
    "global_attention_interval": 4,
    "local_attention_frequency": 2,
    "attn_layer_idxs": [1, 3],
    "nope_layers": [1],
    "local_layer_ids_window": 128,
    "swa_layers": [0, 1],
    "attention_types": [[["global", "local"], 2]],
    "block_types": ["recurrent", "attention"],
    "_block_types": ["recurrent", "attention"],
    "attention_window": 64,
    "cross_layer_sharing": 2,
    "kv_sharing_map": {"1": 0},
    "share_kv_every": 2,
    "use_yoco": True,
    "kv_compression_ratio": 4,
    "compress_ratios": [4, 128],
    "num_memory_tokens": 128,
    "mamba_d_state": 16,
    "ssm_cfg": {"d_state": 16},
    "short_conv_kernel_size": 4,
    "lightning_nh": 32,
    "kda_layers": [1, 2],
    "rwkv_head_size": 64,
    "attn_config": {"sliding_window_size": 128},
    "block_configs": [{"ffn": {}}] * 4,
    "hybrid_layers": [1],
}


@pytest.mark.parametrize("field", UNREAD)
def test_a_field_that_no_rule_reads_is_refused_by_name(field: str) -> None:
    assert size_calculator(PLAIN).bytes_per_token == 4 * 512
    with pytest.raises(ConfigError, match=f"field '(attn_config.)?{field.removeprefix('attn_config')}") as caught:
        size_calculator({**PLAIN, field: UNREAD[field]})
    assert "\n" not in str(caught.value)


SAYS_NOTHING: dict[str, Any] = {
    "loop_num": 1,
    "layer_group_size": 0,
    "use_yoco": False,
    "mamba_d_state": None,
    "block_configs": [],
    "kv_reuse_every_i_layer": -1,
    "attention_type": "full",
    "moe_layer_freq": 2,
    "expert_layer_period": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "rope_layout": [1, 1, 1, 0],
    "rope_local_base_freq": 10_000.0,
    "first_k_dense_replace": 3,
    "n_shared_experts": 2,
    "shared_expert_intermediate_size": 64,
    "num_nextn_predict_layers": 1,
    "layer_norm_eps": 1e-5,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "initializer_range": 0.02,
    "use_cache": True,
    "vision_feature_layer": -2,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 4,
}


@pytest.mark.parametrize("field", SAYS_NOTHING)
def test_what_switches_nothing_on_or_is_about_other_parts_is_not_refused(field: str) -> None:
    assert size_calculator({**PLAIN, field: SAYS_NOTHING[field]}).bytes_per_token == 4 * 512


def test_a_list_of_kinds_settles_patterns_and_unused_states() -> None:
    """Granite 4 micro: fields of Mamba in a model all of whose layers attend."""
    fields = {**PLAIN, "layer_types": ["attention"] * 4, "mamba_d_state": 128, "global_attn_every_n_layers": 4}
    assert size_calculator(fields).bytes_per_token == 4 * 512
    with pytest.raises(ConfigError, match="field 'loop_num'"):  # but not how often they run
        size_calculator({**fields, "loop_num": 2})


def test_a_known_type_shows_what_it_did_not_read() -> None:
    size = size_calculator({**PLAIN, "model_type": "llama", "some_pattern": "ab"})
    assert size.bytes_per_token == 4 * 512
    assert "not read: 'some_pattern'" in size.explain()


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 0, -1, 1e308, 1e-320, True, "2"])
def test_a_factor_that_is_no_number_of_use(factor: Any) -> None:
    with pytest.raises(ConfigError, match="factor must be a number from 1e-6 to 1e6"):
        size_calculator("gpt2", factor=factor)


ODD = [
    None, 0, -1, 2.5, float("inf"), "x", "", [], [1], ["full_attention"], {}, {"a": 1}, True, 10**30, [None] * 4, [[1]],
    "LLLG", [{}], [0] * 3,
]  # fmt: skip
IN_CATALOG = {name for entry in catalog().values() for name in entry}
LOOPS = {"Ouro-2.6B", "IQuest-Coder-V1-40B-Loop"}  # of 192 and 160 layers: four say as much about a field
FIELDS = sorted(IN_CATALOG | set(UNREAD) | {"total_ut_steps", "kv_reuse_group", "loop_window_size"})


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_may_hold_anything(field: str) -> None:
    """A config is data from elsewhere: an answer or one clear line, whatever a field holds."""
    bases = [{**PLAIN, "model_type": kind} for kind in ("never_seen", "llama4_text", "gemma4_text")]
    bases += [fields | ({"num_hidden_layers": 4} if name in LOOPS else {}) for name, (fields, *_) in MODELS.items()]
    for base in bases:
        for value in ODD:
            with suppress(ConfigError):
                size_calculator({**base, field: value}).at(4096)
