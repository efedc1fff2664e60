"""Traps of real config files, one test each: what decides a layer, what is refused, and with which words."""

from typing import Any

import pytest

from kvlab.errors import ConfigError
from kvlab.sizing import KVSize, size_calculator

PLAIN: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 32_768,
    "torch_dtype": "bfloat16",
}
TOKEN = 2 * (64 + 64) * 2  # one layer of PLAIN


def sized(**fields: Any) -> KVSize:
    return size_calculator({**PLAIN, **fields})


def kinds(size: KVSize) -> list[str]:
    return [layer.kind.split()[0] for layer in size.layers]


def test_window_that_is_switched_off() -> None:
    assert sized(sliding_window=4096, use_sliding_window=False).bytes_per_token == 4 * TOKEN
    assert sized(model_type="qwen2", sliding_window=4096).bytes_per_token == 4 * TOKEN  # off by class default
    assert sized(model_type="other", sliding_window=4096, max_window_layers=2).bytes_per_token == 4 * TOKEN


def test_window_from_max_window_layers_on() -> None:
    size = sized(sliding_window=4096, use_sliding_window=True, max_window_layers=3)
    assert kinds(size) == ["full", "full", "full", "sliding"]
    assert size.windows == {4096: TOKEN}


def test_window_at_or_beyond_the_context_is_none() -> None:
    assert sized(sliding_window=32_768).bytes_per_token == 4 * TOKEN
    assert any("never filled" in note for note in sized(sliding_window=262_144).config.notes)


def test_window_in_every_layer() -> None:
    size = sized(model_type="mistral", sliding_window=4096)
    assert (size.growing_bytes, size.windows) == (0, {4096: 4 * TOKEN})
    assert size.at(1 << 20) == size.at(4096)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (2, ["sliding", "full", "sliding", "full"]),
        (4, ["sliding", "sliding", "sliding", "full"]),
        ("LLLG", ["sliding", "sliding", "sliding", "full"]),
    ],
)
def test_window_patterns(pattern: int | str, expected: list[str]) -> None:
    assert kinds(sized(sliding_window=16, sliding_window_pattern=pattern)) == expected


def test_gemma3_4b_text_config_as_published() -> None:
    """It holds five fields; heads, head_dim and the 5:1 pattern come from the class."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    size = size_calculator({"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}}, "bf16")
    assert (size.growing_bytes, size.windows) == (20_480, {1024: 29 * 4_096})


def test_llama4_chunks_every_layer_but_each_fourth() -> None:
    size = sized(model_type="llama4_text", head_dim=64, attention_chunk_size=8192, no_rope_layers=[])
    assert kinds(size) == ["chunked", "chunked", "chunked", "full"]
    explicit = sized(model_type="llama4_text", head_dim=64, attention_chunk_size=8192, no_rope_layers=[1, 0, 1, 0])
    assert kinds(explicit) == ["chunked", "full", "chunked", "full"]


def test_chunk_size_that_means_nothing() -> None:
    """MiMo-V2 has attention_chunk_size 128 and is not chunked."""
    size = sized(attention_chunk_size=128, hybrid_layer_pattern=[0, 1, 1, 0], sliding_window=128, head_dim=64)
    assert kinds(size) == ["full", "sliding", "sliding", "full"]


def test_key_and_value_of_different_width() -> None:
    assert sized(head_dim=192, v_head_dim=128).bytes_per_token == 4 * 2 * (192 + 128) * 2


def test_head_dim_is_never_read_where_a_latent_is() -> None:
    size = sized(kv_lora_rank=512, qk_rope_head_dim=64, head_dim=64, v_head_dim=128)
    assert size.bytes_per_token == 4 * 576 * 2


def test_indexer_in_the_layers_that_have_one() -> None:
    mla = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    assert sized(**mla).bytes_per_token == 4 * (1152 + 132)
    assert sized(**mla, indexer_types=["full", "shared", "shared", "full"]).bytes_per_token == 4 * 1152 + 2 * 132
    assert sized(**mla, index_topk_freq=4).bytes_per_token == 4 * 1152 + 2 * 132  # layers 0 and 1 before the offset


def test_falcon() -> None:
    falcon = {"model_type": "falcon", "num_hidden_layers": 2, "num_attention_heads": 71, "hidden_size": 4544}
    assert size_calculator({**falcon, "multi_query": True}, "bf16").bytes_per_token == 2 * 256
    wide = {**falcon, "num_attention_heads": 128, "hidden_size": 8192, "new_decoder_architecture": True}
    assert size_calculator({**wide, "num_kv_heads": 8}, "bf16").bytes_per_token == 2 * 8 * 256


@pytest.mark.parametrize(
    "name", ["num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups", "num_query_groups"]
)
def test_kv_heads_by_other_names(name: str) -> None:
    fields = {k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}
    assert size_calculator({**fields, "model_type": "other", name: 2}).bytes_per_token == 4 * TOKEN


def test_nested_attention_config() -> None:
    dbrx = {"model_type": "dbrx", "n_layers": 4, "n_heads": 8, "d_model": 512, "attn_config": {"kv_n_heads": 2}}
    assert size_calculator(dbrx, "bf16").bytes_per_token == 4 * TOKEN


def test_heads_removed_layer_by_layer() -> None:
    attention = [{"n_heads_in_group": 4}, {"no_op": True}, {"replace_with_linear": True}, {"n_heads_in_group": 8}]
    size = sized(block_configs=[{"attention": a} for a in attention])
    assert [row["kv_heads"] for row in size.per_layer()] == [2, 0, 0, 1]


def test_shared_layers_keep_nothing() -> None:
    size = sized(model_type="other", num_kv_shared_layers=2)
    assert [row["bytes_per_token"] for row in size.per_layer()] == [TOKEN, TOKEN, 0, 0]
    assert sized(cla_share_factor=2).bytes_per_token == 2 * TOKEN


def test_mtp_layers_only_when_asked() -> None:
    config = {**PLAIN, "num_nextn_predict_layers": 1}
    assert size_calculator(config).bytes_per_token == 4 * TOKEN
    assert size_calculator(config, mtp=True).bytes_per_token == 5 * TOKEN
    assert size_calculator("DeepSeek-V3", mtp=True).bytes_per_token == 62 * 1152


def test_whisper_counts_the_decoder() -> None:
    turbo = {"model_type": "whisper", "is_encoder_decoder": True, "d_model": 1280, "num_hidden_layers": 32,
             "encoder_layers": 32, "decoder_layers": 4, "decoder_attention_heads": 20}  # fmt: skip
    size = size_calculator(turbo, "fp16")
    assert (size.growing_bytes, size.fixed_bytes) == (4 * 2 * 1280 * 2, 4 * 2 * 1280 * 2 * 1500)


def test_vision_layers_hold_vision_tokens() -> None:
    size = size_calculator("Llama-3.2-90B-Vision-Instruct")
    assert size.bytes_per_token == 80 * 4096
    assert size_calculator("Llama-3.2-90B-Vision-Instruct", encoder_tokens=6404).at(0) == 20 * 4096 * 6404


def test_kv_dtype_that_the_checkpoint_asks_for() -> None:
    assert sized(kv_cache_quant_algo="FP8").dtype == "fp8"
    assert sized(quantization_config={"kv_cache_scheme": {"num_bits": 8, "type": "float"}}).dtype == "fp8"
    assert size_calculator("nvidia/GLM-5-NVFP4").dtype == "fp8"


def test_dtype_missing_or_fp32_is_said() -> None:
    fields = {k: v for k, v in PLAIN.items() if k != "torch_dtype"}
    assert "bf16 assumed" in size_calculator(fields).explain()
    assert sized(torch_dtype="float32").dtype == "bf16"
    assert size_calculator({**PLAIN, "torch_dtype": "float32"}, engine="transformers").dtype == "fp32"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_hidden_layers": None}, "field 'num_decoder_layers' .*num_hidden_layers.* is missing"),
        ({"num_key_value_heads": None, "model_type": "other"}, "field 'num_key_value_heads' is missing"),
        ({"hidden_size": None}, "field 'hidden_size'"),
        ({"num_attention_heads": 7}, "field 'head_dim' is missing, and 512 / 7 is no integer"),
        ({"kv_lora_rank": 512}, "field 'qk_rope_head_dim' is missing"),
        ({"layer_types": ["full_attention"] * 3}, "names 3 layers, but it has 4"),
        ({"layer_types": ["warp_attention"] * 4}, "layer type 'warp_attention' is not known"),
        ({"layer_types": ["sliding_attention"] * 4}, "field 'sliding_window'"),
        ({"layer_types": ["linear_attention"] * 4}, "field 'mamba_expand'"),
        ({"hybrid_override_pattern": "MX*M"}, "has 'X'"),
        ({"compress_ratios": [4, 128]}, "field 'compress_ratios'"),
        ({"model_type": "gemma4_text"}, "field 'layer_types' is missing"),
    ],
)
def test_what_cannot_be_known_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        sized(**fields)
    assert "\n" not in str(caught.value)
