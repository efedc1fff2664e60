"""vLLM as the judge: its own KV cache specs, groups and block counts for real configs, built on the meta device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvlab.sizing import KVSize, size_calculator
from kvlab.sizing.cache_specs import StateKV
from kvlab.sizing.catalog import catalog

pytestmark = pytest.mark.slow  # imports vLLM in a process of its own

SCRIPT = Path(__file__).with_name("vllm_specs.py")
MEMORY, TOKENS = 80 << 30, 8192

# Entries that are copies of the published config.json; the architecture is named where a nested text config lost it.
MODELS = {
    "deepseek-ai/DeepSeek-V3": "DeepseekV3ForCausalLM",  # MLA; a mixture of experts comes first
    "openai/gpt-oss-20b": "GptOssForCausalLM",  # every other layer slides
    "google/gemma-4-26B-A4B": "Gemma4ForCausalLM",  # head widths differ by layer
    "XiaomiMiMo/MiMo-V2-Flash": "MiMoV2FlashForCausalLM",  # K wider than V, heads differ by layer
    "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic": "Llama4ForCausalLM",  # chunked local
    "Qwen/Qwen2.5-7B-Instruct": "Qwen2ForCausalLM",  # a window that is switched off
    "google/gemma-3-1b-it": "Gemma3ForCausalLM",  # five sliding to one full
    "bigcode/starcoder2-15b": "Starcoder2ForCausalLM",  # every layer slides
    "mistralai/Mistral-7B-v0.3": "MistralForCausalLM",
    "nvidia/Nemotron-H-56B-Base-8K": "NemotronHForCausalLM",  # Mamba-2 hybrid
}
# What vLLM's class reads besides and the entry, cut to what KV needs, does not hold; none of it touches the cache.
BESIDES: dict[str, dict[str, Any]] = {
    "XiaomiMiMo/MiMo-V2-Flash": {
        "layernorm_epsilon": 1e-5,
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": [0] + [1] * 47,
        "sliding_window_size": 128,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "partial_rotary_factor": 0.334,
        "rope_theta": 5e6,
        "swa_rope_theta": 1e4,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
}
_NOT_GEOMETRY = {
    "source",
    "source_kind",
    "also_seen",
    "unknown",
    "nested_in",
    "outer_model_type",
    "weight_quant_method",
}


def _config(name: str) -> dict[str, Any]:
    entry = catalog()[name]
    assert entry["source_kind"] == "config_json_copy"
    # Weight formats need kernels that a CPU lacks, and change nothing of the cache.
    kept = {k: v for k, v in entry.items() if k not in _NOT_GEOMETRY and not k.startswith(("quant", "kv_cache_"))}
    return {**kept, **BESIDES.get(name, {}), "architectures": [MODELS[name]]}


@pytest.fixture(scope="module")
def judged() -> dict[str, dict[str, Any]]:
    models = json.dumps([[name, _config(name)] for name in MODELS])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), models], capture_output=True, text=True, timeout=280, env=env, check=False
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert len(answers) == len(MODELS), done.stderr[-3000:]
    return {answer["name"]: answer for answer in answers}


def _ours(name: str) -> KVSize:
    return size_calculator(name, "bf16")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_agrees_with_vllm(judged: dict[str, dict[str, Any]], name: str) -> None:
    size = _ours(name)
    mine = [
        (
            spec.token_bytes(size.conventions),
            spec.fixed_bytes(size.conventions) if isinstance(spec, StateKV) else 0,
            spec.window,
        )
        for layer in size.layers
        for spec in layer.specs
    ]
    theirs = [(layer["token_bytes"], layer["state_bytes"], layer["window"]) for layer in judged[name]["layers"]]
    assert mine == theirs


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MODELS)
def test_reserved_figures_agree_with_vllm(judged: dict[str, dict[str, Any]], name: str) -> None:
    theirs = judged[name]
    held = _ours(name).reserved(TOKENS, **theirs["engine"])
    assert held.pool_blocks(MEMORY) == theirs["num_blocks"]
    assert sorted(group.num_layers for group in held.groups) == theirs["groups"]
    assert held.max_sequences(MEMORY) == theirs["sequences"]
    assert held.capacity_tokens(MEMORY) == theirs["capacity_tokens"]
