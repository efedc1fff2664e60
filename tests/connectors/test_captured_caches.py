"""Caches of transformers, captured and put back: the next logits are right, or the cache is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, StaticCache

from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import capture, from_cache, to_cache
from kvlab.errors import ConfigError

S, F, L = "sliding_attention", "full_attention", "linear_attention"
BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 32}  # fmt: skip
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
       **MOE}  # fmt: skip
DELTA = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4, "shared_expert_intermediate_size": 32, **MOE,
}  # fmt: skip
MAMBA2 = {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_conv": 4}

RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "windows and full attention": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "layer_types": [S, S, S, F]}),
    "window everywhere": ("mistral", {"sliding_window": 6}),
    "window from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "windows first": ("gpt_oss", {"head_dim": 16, "sliding_window": 6, "layer_types": [S, F, S, F], **MOE}),
    "shared across layers": (
        "gemma4_text",
        {"head_dim": 16, "global_head_dim": 16, "sliding_window": 6, "layer_types": [S, F, S, F],
         "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97},
    ),
    "latent": ("deepseek_v3", {**MLA, "q_lora_rank": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gated delta net": ("qwen3_next", {"layer_types": [L, L, L, F], **DELTA}),
    "gated delta net 3.5": ("qwen3_5_text", {"layer_types": [L, L, L, F], **DELTA}),
    "short convolution": ("lfm2", {"layer_types": ["conv", F, "conv", F], "conv_L_cache": 3}),
    "mamba-2 beside attention": ("falcon_h1", {**MAMBA2, "mamba_d_ssm": 128, "head_dim": 16}),
    "mamba-2 hybrid": (
        "granitemoehybrid",
        {**MAMBA2, **MOE, "layer_types": ["mamba", "attention"] * 2, "mamba_expand": 2, "shared_intermediate_size": 32},
    ),
    "delta attention beside latents": (
        "kimi_linear",
        {**MLA, "head_dim": 16, "linear_attn_config": {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4,
                                                       "kda_layers": [1, 2, 3], "full_attn_layers": [4]}},
    ),
    "latent with indexer": (
        "deepseek_v32",
        {**MLA, "q_lora_rank": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "index_head_dim": 40,
         "index_n_heads": 2, "index_topk": 4},
    ),
}  # fmt: skip
TOKENS = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(1))
MORE = (5, 6, 7, 8)


def model_of(kind: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**BASE, **fields})).eval().float()


@torch.inference_mode()
def read(model: Any) -> Any:
    return model(TOKENS, use_cache=True).past_key_values


@torch.inference_mode()
def next_logits(model: Any, cache: Any, *, positions: bool) -> torch.Tensor:
    found = []
    for step, token in enumerate(MORE):
        where = {"position_ids": torch.tensor([[TOKENS.shape[1] + step]])} if positions else {}
        found.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True, **where).logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("family", RIGHT)
def test_the_next_tokens_are_those_of_the_cache_that_was_captured(family: str, tmp_path: Path) -> None:
    model = model_of(*RIGHT[family])
    want = next_logits(model, read(model), positions=True)
    for kv in (capture(model, TOKENS[0].tolist()), from_cache(read(model), TOKENS[0].tolist())):
        kv.save(tmp_path / "kv.safetensors")
        for again in (kv, KV.load(tmp_path / "kv.safetensors")):
            for positions in (True, False):
                torch.testing.assert_close(
                    next_logits(model, to_cache(again), positions=positions), want, atol=1e-5, rtol=1e-4
                )


def test_a_window_is_kept_as_such() -> None:
    model = model_of(*RIGHT["windows first"])
    kv = from_cache(read(model), TOKENS[0].tolist())
    assert kv.windows == (6, None, 6, None)
    assert [key.shape[0] for key in kv.keys] == [5, 20, 5, 20]
    again = from_cache(to_cache(kv), TOKENS[0].tolist())
    assert again.windows == kv.windows
    assert not any(error.any() for pair in zip(kv.keys, again.keys, strict=True) for error in [pair[0] - pair[1]])
    assert capture(model, TOKENS[0].tolist()).windows == ()  # capture keeps all tokens in every layer


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_keeps_more_than_kv_is_refused(family: str) -> None:
    model = model_of(*REFUSED[family])
    for attempt in (
        lambda: capture(model, TOKENS[0].tolist()),
        lambda: from_cache(read(model), TOKENS[0].tolist()),
    ):
        with pytest.raises(ConfigError, match=r"layer 0 of the cache is a .*capture takes models") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_other_caches_are_refused() -> None:
    model = model_of(*RIGHT["plain"])
    static = StaticCache(config=model.config, max_cache_len=32)
    with torch.inference_mode():
        model(TOKENS, past_key_values=static, use_cache=True)
    two = DynamicCache()
    with torch.inference_mode():
        model(TOKENS.repeat(2, 1), past_key_values=two, use_cache=True)
    for cache, words in ((static, "StaticLayer"), (two, "exactly one sequence"), (None, "exactly one sequence")):
        with pytest.raises(ConfigError, match=words):
            from_cache(cache, TOKENS[0].tolist())


@pytest.mark.parametrize("family", ["plain", "window everywhere"])
def test_a_cache_that_read_more_than_its_tokens_is_refused(family: str) -> None:
    """As generate() leaves it, given with the prompt alone."""
    model = model_of(*RIGHT[family])
    with pytest.raises(ConfigError, match="has read 20 tokens, but token_ids and num_positions say 15"):
        from_cache(read(model), TOKENS[0, :15].tolist())
