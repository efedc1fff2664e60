"""How a model turns keys by their position, proven by the model itself, and keys turned to another one.

Rotary embedding turns pairs of channels, (i, i + half), by an angle for each position that a token lies further on. A
model says its angles in a buffer; how its layers use them is code. So the code is asked: a few tokens are computed at
their places and again further on, also at the model's last places. The keys of every layer must be those that `turn`
gives, and the values the same as before: caches of latents (MLA) keep what is turned as values.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvlab.connectors.transformers import check_model, layers_at
from kvlab.errors import ConfigError

FIXED = ("default", "linear", "llama3", "yarn", "proportional")  # kinds of rope whose angles are always the same
FURTHER = 1024  # places that the proof moves its tokens: far enough for slow channels, near enough for float32
FLOAT32_TURN = 2.0**-23  # radians by which a place in float32 may be off, for each place
CLOSE = {torch.float32: 2e-3, torch.float64: 2e-3}  # relative error of a pair of channels; rounding grows by layer
CLOSE_ENOUGH = 0.2  # in 16 bits
TOKENS = (3, 1, 4, 1, 5)

# By model: what it said of its angles when it was asked, and what it was found to do.
_proven: "WeakKeyDictionary[Any, tuple[list[torch.Tensor], torch.Tensor]]" = WeakKeyDictionary()


def rope_of(model: Any) -> torch.Tensor:
    """Radians that each pair of channels turns a token, float64 (layers, pairs); 0 in layers that know no position.

    Parameters
    ----------
    model
        a causal model of transformers; it computes a few tokens

    Raises
    ------
    ConfigError
        where a position turns keys otherwise: other pairs of channels, angles that depend on the prompt's length
        (`dynamic`, `longrope`), values that know their place (latents of MLA), no rotary embedding
    """
    check_model(model)
    if rotary_of(model) is not None and model.training:
        raise ConfigError("the model is in training, where dropout changes keys; call model.eval() first")
    angles = [buffer.detach().clone() for buffer in (rotary_of(model) or torch.nn.Module()).buffers()]
    said, found = _proven.get(model, ([], None))
    if found is None or len(said) != len(angles) or not all(map(torch.equal, said, angles)):
        found = _ask(model)
        _proven[model] = angles, found
    return found


def turn(keys: torch.Tensor, by: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """One layer's keys (tokens, kv_heads, head_dim), each `by` positions further on, (tokens, kv_heads) or what
    broadcasts. `frequencies` (pairs); further channels stay."""
    half = len(frequencies)
    angles = by.double()[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = keys[..., :half].double(), keys[..., half : 2 * half].double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, keys[..., 2 * half :].double()], dim=-1).to(keys.dtype)


def rotary_of(model: Any) -> Any:
    """The module that makes a model's angles; None where there is none."""
    return getattr(model.base_model, "rotary_emb", None)


def layer_types(model: Any) -> list[str]:
    """The kind of each layer, where a model's rope differs by it; [] elsewhere."""
    has_one = hasattr(rotary_of(model), "inv_freq")
    return [] if has_one else list(getattr(model.config, "layer_types", None) or [])


def _ask(model: Any) -> torch.Tensor:
    rope, name = rotary_of(model), model.config.model_type
    given = getattr(model.config, "rope_parameters", None) or {}
    by_type = {kind: own for kind, own in given.items() if isinstance(own, dict)}
    kinds = {own.get("rope_type", "default") for own in by_type.values() or [given]}
    if rope is None:
        raise ConfigError(f"the rope of a {name} model is not known here: it has no rotary embedding of all layers")
    if other := kinds - {*FIXED}:
        raise ConfigError(
            f"the rope of this {name} model is {', '.join(sorted(other))}: its angles may depend on the prompt's "
            f"length, so keys cannot be turned to another place; known: {', '.join(FIXED)}"
        )
    count = model.config.num_hidden_layers
    names = [f"{kind}_inv_freq" for kind in layer_types(model)] or ["inv_freq"] * count
    if any(not isinstance(getattr(rope, each, None), torch.Tensor) for each in names):
        raise ConfigError(f"the rope of a {name} model is not known here: it does not say its angles")
    buffers = [getattr(rope, each).double().cpu() for each in names]
    if len({len(buffer) for buffer in buffers}) > 1:
        raise ConfigError(
            f"the rope of a {name} model is not known here: its layers turn different numbers of channels"
        )
    frequencies = torch.stack(buffers)
    if any(_is_rounded(frequencies, dtype) for dtype in (torch.bfloat16, torch.float16)):
        raise ConfigError(
            f"the angles of this {name} model are rounded to 16 bits, as by model.bfloat16(); load it with "
            "from_pretrained(..., dtype=torch.bfloat16), which leaves them as they are"
        )
    longest = int(getattr(model.config, "max_position_embeddings", 0) or 0) - len(TOKENS)
    places = sorted({FURTHER, max(longest, FURTHER)})
    near, *moved = (
        [(keys.double().cpu(), values.double().cpu()) for keys, values in layers_at(model, TOKENS, first)]
        for first in (0, *places)
    )
    if len(near) != len(frequencies):
        raise ConfigError(f"the rope of a {name} model is not known here: {count} layers keep {len(near)} times keys")
    for at, (old, old_values) in enumerate(near):
        if old.shape[-1] < 2 * frequencies.shape[1]:
            raise ConfigError(f"the rope of a {name} model turns more channels than layer {at} keeps")
        turns = None
        for place, far in zip(places, moved, strict=True):
            allowed = max(CLOSE.get(model.dtype, CLOSE_ENOUGH), place * FLOAT32_TURN)
            new, new_values = far[at]
            if not _error(new_values, old_values) <= allowed:
                raise ConfigError(
                    f"layer {at} of this {name} model keeps values that change with their place, as caches of latents "
                    "(MLA) do, so its KV cannot be moved to another place"
                )
            stays = _error(new, old) <= allowed
            turned = _error(new, turn(old, torch.tensor(place).reshape(1, 1), frequencies[at])) <= allowed
            if not (stays if turns is False else turned if turns else stays or turned):
                raise ConfigError(
                    f"layer {at} of this {name} model does not turn keys as known here (pairs of channels i and i + "
                    f"half by the angles that its rotary embedding says, up to place {place}), so they cannot be "
                    "turned to another place"
                )
            turns = not stays
        if not turns:
            frequencies[at] = 0
    return frequencies


def _is_rounded(frequencies: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every angle is a number of `dtype`, which powers of a base are by rounding alone. Powers of two, and
    angles that are none, are numbers of every dtype and tell nothing."""
    telling = frequencies[(frequencies != 0) & (torch.frexp(frequencies).mantissa != 0.5)]
    return len(telling) > len(frequencies) and torch.equal(telling.to(dtype).double(), telling)


def _error(true: torch.Tensor, other: torch.Tensor) -> float:
    """The largest relative error of a channel over tokens and heads; that of a small one beside the layer's others."""
    size = true.square().sum((0, 1)).sqrt()
    off = (true - other).square().sum((0, 1)).sqrt()
    return float((off / size.maximum(size.mean() / 10)).max())
