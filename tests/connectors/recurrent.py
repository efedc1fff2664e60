"""Small random models with recurrent states that vLLM's CPU build computes, with settings for `engine`.

Its Mamba-2 kernel ignores states that are wanted within a step (`without_states_within_a_step`), and its short
convolution gives other numbers where a prompt is cut into other steps: these models go with steps of one block. It has
no kernel for Mamba-1 (``selective_scan_fwd``), and none for gated delta rules but in bfloat16.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from tests.connectors import damage
from tests.connectors.engine import BLOCK, worker

COMMON = {
    "vocab_size": 49152, "initializer_range": 0.2, "tie_word_embeddings": False, "max_position_embeddings": 1024,
}  # fmt: skip
ATTENTION = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 32,
}  # fmt: skip


def mamba2():
    """Without attention: each layer has a state, and nothing else is kept."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"state_size": 16, "num_heads": 8, "head_dim": 32, "expand": 2, "n_groups": 1, "chunk_size": 32}
    return Mamba2ForCausalLM(Mamba2Config(hidden_size=128, num_hidden_layers=3, **sizes, **COMMON))


def falcon_h1():
    """Attention and Mamba-2 in each layer."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(num_hidden_layers=3, head_dim=64, mamba_d_ssm=256, **ATTENTION, **MAMBA, **COMMON)
    return FalconH1ForCausalLM(config)


def granite4():
    """Layers of Mamba-2 and of attention."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        num_hidden_layers=4, layer_types=["mamba", "mamba", "attention", "mamba"], mamba_expand=2, num_local_experts=0,
        num_experts_per_tok=0, shared_intermediate_size=256, position_embedding_type="rope", **MAMBA, **COMMON,
        **(ATTENTION | {"num_key_value_heads": 4}),
    )  # fmt: skip
    return GraniteMoeHybridForCausalLM(config)


def nemotron_h():
    """Layers of Mamba-2, of attention, and of neither."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        layers_block_type=["mamba", "mlp", "attention", "mamba"], head_dim=64, mamba_num_heads=8, mamba_head_dim=32,
        n_groups=1, ssm_state_size=16, expand=2, chunk_size=32, **ATTENTION, **COMMON,
    )  # fmt: skip
    return NemotronHForCausalLM(config)


def zamba2():
    """Mamba-2 in each layer, and one attention block that layers share."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    config = Zamba2Config(
        num_hidden_layers=4, layers_block_type=["mamba", "mamba", "hybrid", "mamba"], attention_head_dim=64,
        attention_hidden_size=256, mamba_expand=2, mamba_ngroups=1, n_mamba_heads=8, mamba_headdim=32, chunk_size=32,
        num_mem_blocks=1, adapter_rank=16, use_shared_attention_adapter=False, use_mem_rope=True, mamba_d_state=16,
        **(ATTENTION | {"num_key_value_heads": 4}), **(COMMON | {"tie_word_embeddings": True}),
    )  # fmt: skip
    return Zamba2ForCausalLM(config)


def lfm2():
    """Short convolutions, whose state is the last two tokens' inputs, and attention."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    kinds = ["conv", "conv", "full_attention", "conv"]
    sizes = ATTENTION | {"hidden_size": 256}
    config = Lfm2Config(num_hidden_layers=4, layer_types=kinds, block_auto_adjust_ff_dim=False, **sizes, **COMMON)
    return Lfm2ForCausalLM(config)


def qwen3_next():
    """Gated delta rules, and attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"], head_dim=64, num_experts=4,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=64, linear_value_head_dim=64,
        num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64, decoder_sparse_step=1,
        mlp_only_layers=[], **ATTENTION, **COMMON,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


MODELS = {make.__name__: make for make in (mamba2, falcon_h1, granite4, nemotron_h, zamba2, lfm2, qwen3_next)}


def recurrent(folder: Path, name: str) -> dict:
    """Save a model, and say how an engine runs it."""
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    settings = {
        "model": str(folder), "skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": True,
    }  # fmt: skip
    if name == "lfm2":  # vLLM reads what this version of transformers does not write
        file = folder / "config.json"
        more = {"conv_dim": 256, "block_dim": 256, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    if name == "qwen3_next":
        settings["dtype"] = "bfloat16"
    else:
        settings["max_num_batched_tokens"] = BLOCK
    return settings


@contextmanager
def without_states_within_a_step() -> Iterator[None]:
    """Mamba-2 as the other kinds: it leaves a state where a step ends and nowhere else, so steps may have any length
    on a CPU too."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MambaMixer2, "get_kv_cache_spec", MambaBase.get_kv_cache_spec)
        yield


def overwritten(llm) -> AbstractContextManager[list[int]]:
    """`damage.overwritten` of whole pages, byte by byte: states of any type, and the padding behind them."""
    layers = worker(llm).transfer.layout.pages
    return damage.overwritten(llm, pages=lambda block_id: [layer[block_id] for layer in layers], garbage=damage.GARBAGE)
