"""Small random models and LoRA adapters: made in seconds, without a download, and quick on a CPU."""

import json
from pathlib import Path

import torch

VOCABULARY = 4096
LAYERS, WIDTH, KV_HEADS, HEAD = 4, 256, 2, 64
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD * 4  # of KV in float32
SIZES = {
    "vocab_size": VOCABULARY, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_llama(folder: Path) -> str:
    """A Llama of four layers. Its weights are wide, so that attention is sharp: one wrong page changes the answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, initializer_range=0.1, **SIZES
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def tiny_adapter(folder: Path, seed: int) -> str:
    """A LoRA adapter of `tiny_llama` that changes K and V."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", WIDTH), ("v_proj", KV_HEADS * HEAD)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(8, WIDTH, generator=rng) * 0.1
            tensors[f"{base}.lora_B.weight"] = torch.randn(width, 8, generator=rng) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)
