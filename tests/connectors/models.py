"""Small models of other kinds than the demo model."""

import torch

WINDOW = 80  # no multiple of a block


def gemma(folder, layer_types) -> dict:
    """A small Gemma 3 with these layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=len(layer_types),
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=WINDOW, layer_types=layer_types,
        initializer_range=0.2, max_position_embeddings=1024, query_pre_attn_scalar=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return {"model": str(folder), "skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20}
