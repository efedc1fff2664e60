"""KV out of a transformers model and back into one: the only file that imports transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from kvlab.connectors.captured import KV
from kvlab.errors import ConfigError


def load_model(model: str | Path) -> PreTrainedModel:
    """A causal language model from a checkpoint folder, in its own dtype."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto")
    return loaded.eval()


@torch.inference_mode()
def capture(model: PreTrainedModel | str | Path, text: str | list[int], max_tokens: int | None = None) -> KV:
    """Run `text` through `model` once and return the KV it left.

    `model` is a loaded causal model or a checkpoint folder; `text` a string (tokenized by the model's own
    tokenizer, no chat template) or token ids; `max_tokens` cuts it off.
    """
    loaded = load_model(model) if isinstance(model, str | Path) else model
    token_ids = text if isinstance(text, list) else tokenize(loaded.config._name_or_path, text)
    token_ids = token_ids[:max_tokens]
    if not token_ids:
        raise ConfigError("text to capture must hold at least one token, got none")
    cache = DynamicCache()
    loaded(torch.tensor([token_ids], device=loaded.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return from_cache(cache, token_ids, model=str(loaded.config._name_or_path))


def tokenize(model: str | Path, text: str) -> list[int]:
    """`text` as token ids of the tokenizer that lies beside `model`."""
    ids: list[int] = AutoTokenizer.from_pretrained(str(model))(text)["input_ids"]
    return ids


def from_cache(cache: Any, token_ids: list[int], num_positions: int | None = None, model: str = "") -> KV:
    """The KV that a `DynamicCache` holds for its single sequence, pruned (kvpress) or not.

    `num_positions` is how many tokens the model had read, where `token_ids` are not all of them.
    """
    layers = [layer for layer in cache.layers if layer.keys is not None]
    if not layers or layers[0].keys.shape[0] != 1:
        raise ConfigError("a cache to capture must hold exactly one sequence; use cache.batch_select_indices first")
    keys = tuple(layer.keys[0].transpose(0, 1) for layer in layers)
    values = tuple(layer.values[0].transpose(0, 1) for layer in layers)
    return KV(keys, values, tuple(token_ids), len(token_ids) if num_positions is None else num_positions, model)


def to_cache(kv: KV, device: torch.device | str = "cpu") -> DynamicCache:
    """A new `DynamicCache` with `kv` in it. Feed the next token at position `kv.num_positions`."""
    pairs = zip(kv.keys, kv.values, strict=True)
    return DynamicCache([tuple(half.transpose(0, 1)[None].to(device) for half in pair) for pair in pairs])
