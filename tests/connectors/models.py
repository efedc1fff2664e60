"""Small models: a short demo model, and other kinds."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from kvlab.datasets.demo_model import demo_model

KEPT = (0, 1, 2, 3, 28, 29)  # of the demo model's layers: its answers to other prompts are others, as the whole one's
TOKEN_BYTES = len(KEPT) * 2 * 3 * 64 * 4  # of KV: K and V, three heads of 64 floats
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


@cache
def short_demo() -> str:
    """Folder of the demo model with the layers of `KEPT`, which costs a third of its time. Made once, beside it."""
    from safetensors.torch import load_file, save_file

    whole = Path(demo_model())
    made = whole.with_name(f"{whole.name}-layers-{'-'.join(map(str, KEPT))}")
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
            new = Path(folder) / "model"
            shutil.copytree(whole, new, ignore=shutil.ignore_patterns("*.safetensors"))
            config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": len(KEPT)}
            (new / "config.json").write_text(json.dumps(config))
            kept = {}
            for name, tensor in load_file(whole / "model.safetensors").items():
                before, layers, rest = name.partition(".layers.")
                number, _, rest = rest.partition(".")
                if not layers:
                    kept[name] = tensor
                elif int(number) in KEPT:
                    kept[f"{before}{layers}{KEPT.index(int(number))}.{rest}"] = tensor
            save_file(kept, new / "model.safetensors", {"format": "pt"})
            if not made.exists():  # another process may have been faster
                new.rename(made)
    return str(made)
