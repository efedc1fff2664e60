"""What the transformers config class fills in when a published config.json leaves a field out.

Nested text configs are saved as differences from their class (gemma-3-4b-it's gives neither heads nor head_dim), so a
missing field there means the class's value, not "unknown" and not multi-head attention. Only fields that KV needs are
listed, only for classes whose published configs are known to omit them; checked against transformers in the tests.
"""

from typing import Any

_QWEN_WINDOW = {"use_sliding_window": False}

CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 4096},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "gemma": {"head_dim": 256},
    "gemma2": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "num_hidden_layers": 26,
        "sliding_window": 4096,
    },
    "gemma3n_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 15,
        "sliding_window": 512,
    },
    "gemma4_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "num_kv_shared_layers": 0,
        "sliding_window": 512,
    },
    "glm": {"num_key_value_heads": 2, "head_dim": 128},
    "glm4": {"num_key_value_heads": 2, "head_dim": 128},
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
    "lfm2": {"num_key_value_heads": 8, "conv_L_cache": 3},
    "llama4_text": {
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
    },
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8},
    "nemotron_h": {"conv_kernel": 4, "n_groups": 8},
    "qwen2": _QWEN_WINDOW,
    "qwen2_moe": _QWEN_WINDOW,
    "qwen2_vl_text": _QWEN_WINDOW,
    "qwen2_5_vl_text": _QWEN_WINDOW,
    "qwen3": {**_QWEN_WINDOW, "head_dim": 128},
    "qwen3_moe": _QWEN_WINDOW,
    "qwen3_vl_text": {"head_dim": 128},
    "qwen3_next": {
        "head_dim": 256,
        "num_key_value_heads": 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    "seed_oss": {"num_key_value_heads": 8, "head_dim": 128},
    "smollm3": {**_QWEN_WINDOW, "num_key_value_heads": 4},
    "stablelm": {"num_key_value_heads": 32},
    "t5": {"d_kv": 64},
    "whisper": {"max_source_positions": 1500},
}

# Classes where a missing num_key_value_heads means one KV head per attention head.
ONE_KV_HEAD_PER_HEAD = frozenset(
    {
        "bart",
        "biogpt",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
        "granitemoe",
        "hunyuan_v1_dense",
        "internlm",
        "jais2",
        "llama",
        "m2m_100",
        "marian",
        "mbart",
        "mpt",
        "mt5",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "pegasus",
        "persimmon",
        "phi",
        "phi-msft",
        "phi3",
        "qwen",
        "t5",
        "umt5",
        "whisper",
        "xglm",
    }
)
