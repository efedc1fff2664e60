"""KV out of a transformers model and back into one: the only file that imports transformers.

Only caches whose layers hold the K and V of tokens and nothing else are taken. A recurrent state, an indexer's keys or
a quantized layer would be lost on the way, so they are refused.
"""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvlab.connectors.captured import KV
from kvlab.errors import ConfigError


def load_model(model: str | Path) -> PreTrainedModel:
    """A causal language model from a checkpoint folder, in its own dtype."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto")
    return loaded.eval()


@torch.inference_mode()
def capture(model: PreTrainedModel | str | Path, text: str | list[int], max_tokens: int | None = None) -> KV:
    """Run `text` through `model` once and return the KV it left.

    Parameters
    ----------
    model
        a loaded causal model of transformers, or a checkpoint folder
    text
        text, tokenized by the model's own tokenizer without a chat template; or token ids
    max_tokens
        tokens after which `text` is cut off

    Returns
    -------
    KV
        ``keys`` and ``values`` of each layer, shape (tokens, kv_heads, head_dim), keys after rotary embedding;
        ``tensor()`` has the shape (layers, tokens, kv_heads, kv=2, head_dim)

    Raises
    ------
    ConfigError
        for an empty text, an encoder-decoder, and models whose layers keep more than K and V of tokens

    Examples
    --------
    >>> capture("path/to/model", "some text", max_tokens=1024).save("kv.safetensors")  # doctest: +SKIP
    """
    loaded = load_model(model) if isinstance(model, str | Path) else model
    check_model(loaded)
    token_ids = text if isinstance(text, list) else tokenize(loaded.config._name_or_path, text)
    token_ids = token_ids[:max_tokens]
    if not token_ids:
        raise ConfigError("text to capture must hold at least one token, got none")
    check_tokens(loaded, token_ids)
    if loaded.config.is_encoder_decoder:
        raise ConfigError(f"{loaded.config.model_type} is an encoder-decoder; only causal language models are captured")
    _refuse_other_layers(DynamicCache(config=loaded.config).layers)
    cache = DynamicCache()  # without the config: layers that see a window keep all tokens too
    loaded(torch.tensor([token_ids], device=loaded.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return from_cache(cache, token_ids, model=str(loaded.config._name_or_path))


def check_model(model: Any) -> None:
    """ConfigError unless `model` is a loaded model of transformers, or one that wraps it."""
    is_model = isinstance(model, torch.nn.Module) and hasattr(model, "base_model")
    if not is_model or not hasattr(getattr(model, "config", None), "model_type"):
        raise ConfigError(
            f"a model must be a causal model of transformers, as `load_model` gives it, got {type(model).__name__}"
        )


def check_tokens(model: PreTrainedModel, token_ids: Sequence[Any]) -> None:
    """ConfigError unless `model` has each of these tokens."""
    known = int(model.get_input_embeddings().weight.shape[0])
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < known:
            raise ConfigError(f"token ids must be whole numbers from 0 to {known - 1}, got {token!r}")


@torch.inference_mode()
def layers_at(model: PreTrainedModel, token_ids: Sequence[int], first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's keys and values of a few tokens whose first one stands at place `first`, (tokens, kv_heads,
    head_dim) each."""
    cache = DynamicCache()
    ids, places = (
        torch.tensor([list(row)], device=model.device) for row in (token_ids, range(first, first + len(token_ids)))
    )
    model(ids, past_key_values=cache, position_ids=places, use_cache=True)
    _refuse_other_layers(cache.layers)
    held = [layer for layer in cache.layers if layer.keys is not None and layer.values is not None]
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in held]


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """For each layer whose attention sees a window: of how many tokens; None elsewhere."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]


def tokenize(model: str | Path, text: str) -> list[int]:
    """`text` as token ids of the tokenizer that lies beside `model`."""
    ids: list[int] = AutoTokenizer.from_pretrained(str(model))(text)["input_ids"]
    return ids


def from_cache(cache: Any, token_ids: list[int], num_positions: int | None = None, model: str = "") -> KV:
    """The KV that a `DynamicCache` holds for its single sequence, pruned (kvpress) or not.

    `num_positions` is how many tokens the model had read, where `token_ids` are not all of them. Raises ConfigError for
    a cache of another kind, of several sequences, or that holds more tokens than the model is said to have read.
    """
    layers = list(getattr(cache, "layers", ()))
    _refuse_other_layers(layers)
    while layers and layers[-1].keys is None:  # the last layers of some models read the KV of earlier ones
        layers.pop()
    if not layers or any(layer.keys is None or layer.keys.shape[0] != 1 for layer in layers):
        raise ConfigError(
            "a cache to capture must hold exactly one sequence in each of its layers; select one with "
            "cache.batch_select_indices first"
        )
    positions = len(token_ids) if num_positions is None else num_positions
    for index, layer in enumerate(layers):
        read = layer.get_seq_length() if type(layer) is DynamicSlidingWindowLayer else layer.keys.shape[-2]
        if read > positions or (read != positions and type(layer) is DynamicSlidingWindowLayer):
            raise ConfigError(
                f"layer {index} of the cache has read {read} tokens, but token_ids and num_positions say {positions}; "
                "give the ids of all tokens it has read"
            )
    keys = tuple(layer.keys[0].transpose(0, 1) for layer in layers)
    values = tuple(layer.values[0].transpose(0, 1) for layer in layers)
    windows = tuple(layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in layers)
    return KV(keys, values, tuple(token_ids), positions, model, windows if any(windows) else ())


def to_cache(kv: KV, device: torch.device | str = "cpu") -> DynamicCache:
    """A new `DynamicCache` with `kv` in it. Feed the next token at position `kv.num_positions`.

    Of a pruned `kv`, the cache does not know how many tokens were read: give the model `position_ids`. Raises
    ConfigError for KV with recurrent states, which an engine lays out in its own way.
    """
    if kv.states:
        raise ConfigError("KV with recurrent states goes into no cache of transformers: its states would be lost")
    cache = DynamicCache([tuple(_half(half, device) for half in pair) for pair in zip(kv.keys, kv.values, strict=True)])
    for index, window in enumerate(kv.windows):
        if window is not None:
            layer = DynamicSlidingWindowLayer(sliding_window=window)
            keys, values = (_half(half[index], device) for half in (kv.keys, kv.values))
            layer.update(keys, values)
            layer.cumulative_length = kv.num_positions  # not the tokens that are left of them
            cache.layers[index] = layer
    return cache


def _half(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.transpose(0, 1)[None].to(device)


def _refuse_other_layers(layers: Sequence[Any]) -> None:
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ConfigError(
                f"layer {index} of the cache is a {type(layer).__name__}, which holds more or other than the K and V "
                "of tokens (a recurrent state, say, or quantized memory); capture takes models whose layers all attend "
                "and a DynamicCache"
            )
