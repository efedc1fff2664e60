"""A prompt of which each head keeps some tokens, as a shorter prompt: presses, as kvpress calls them.

A press scores the tokens of each layer's heads; those with the highest scores are kept. Heads may keep different
tokens: an engine needs the same number of them everywhere, and nothing else, once the keys are turned to the places
that they come to. `PRESSES` are scores of a few lines; `pressed` takes an object of kvpress.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from typing import Any

import torch
from torch.nn.functional import avg_pool1d, pad

from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import to_cache
from kvlab.errors import ConfigError
from kvlab.reuse.methods import kept
from kvlab.reuse.rope import layer_types, rope_of, rotary_of


@dataclass(frozen=True)
class Layer:
    """What a press sees of a layer: `keys` and `values` (kv_heads, tokens, head_dim), keys after RoPE; the attention
    `module` of transformers, what it was called with, and what it returned beside its output. `turns`: whether
    positions turn its keys."""

    number: int
    keys: torch.Tensor
    values: torch.Tensor
    module: Any
    given: dict[str, Any]
    attentions: torch.Tensor | None = None
    turns: bool = True

    @property
    def queries(self) -> torch.Tensor:
        """Before RoPE: (heads, tokens, head_dim). ConfigError where the module does not say how they are made."""
        module, hidden = self.module, self.given["hidden_states"][0]
        width = module.config.num_attention_heads * module.head_dim
        if (project := getattr(module, "q_proj", None) or getattr(module, "qkv_proj", None)) is None:
            raise ConfigError(f"{type(module).__name__} has no q_proj or qkv_proj, which this press needs")
        queries: torch.Tensor = project(hidden)[:, :width]
        norm = getattr(module, "q_norm", None)
        if norm is not None and norm.weight.numel() == width:  # of all heads together
            queries = norm(queries)
        queries = queries.view(len(queries), -1, module.head_dim)
        if norm is not None and norm.weight.numel() == module.head_dim:
            queries = norm(queries)
        return queries.transpose(0, 1)

    def by_kv_head(self, of_heads: torch.Tensor) -> torch.Tensor:
        """The mean over the query heads that share a KV head: (heads, ...) -> (kv_heads, ...)."""
        return of_heads.view(len(self.keys), -1, *of_heads.shape[1:]).mean(1)

    def shared(self, of_kv_heads: torch.Tensor) -> torch.Tensor:
        """(kv_heads, ...) -> (heads, ...)."""
        return of_kv_heads.repeat_interleave(self.module.config.num_attention_heads // len(self.keys), dim=0)


Score = Callable[[Layer], torch.Tensor]  # (kv_heads, tokens): the highest are kept


def pruned(model: Any, kv: KV, score: Score, keep: float) -> KV:
    """The share `keep` of each head's tokens that `score` likes best, as a shorter prompt.

    Parameters
    ----------
    model
        the same model in transformers: it computes `kv.token_ids` again, as scores may need queries
    kv
        of a whole prompt, read from an engine, say; scores see its keys and values

    Returns
    -------
    KV
        for ``cache.write(list(kv.token_ids), kv)``, to be asked with a question behind it
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"the share of tokens to keep must be above 0 and at most 1, got {keep}")
    count = num_kept(keep, kv.num_positions)

    def choose(layer: Layer) -> torch.Tensor:
        scores = score(layer)
        if not isinstance(scores, torch.Tensor):
            raise ConfigError(f"a score must return a tensor, (kv_heads, tokens), got {type(scores).__name__}")
        if scores.shape != layer.keys.shape[:2] or bool(scores.isnan().any()):
            raise ConfigError(
                f"scores of layer {layer.number} must be {list(layer.keys.shape[:2])} numbers, (kv_heads, tokens); "
                f"got shape {list(scores.shape)}{', with NaN' if bool(scores.isnan().any()) else ''}"
            )
        return scores.topk(count).indices.sort().values

    return _chosen(model, kv, choose)


def num_kept(keep: float, num_tokens: int) -> int:
    """How many tokens the share `keep` of them is, at least one.

    kvpress is told a ratio to drop, and keeps what a float makes of 1 - ratio: of 100 tokens 9 at a ratio of 0.9, as
    1 - 0.9 is a little less than 0.1. A share that is such a float keeps as many. Any other counts as it is written:
    0.29 of 100 are 29, though the float is a little less.
    """
    written = Decimal(str(float(keep)))
    share = float(keep) if 1 - float(1 - written) == keep else written
    return max(int(share * num_tokens), 1)


def pressed(model: Any, kv: KV, press: Any) -> KV:
    """The same with a press of kvpress, or of any object with its ``forward_hook(module, input, kwargs, output)``, or
    with its ``compress(module, hidden_states, keys, values, attentions, kwargs)`` alone.

    Raises
    ------
    ConfigError
        for presses that do more than choose tokens, choose more of them in one head than in another, or need passes of
        their own; and where the press raises, with what it said
    """
    name, calls = type(press).__name__, [cls.__name__ for cls in type(press).__mro__ if "__call__" in vars(cls)]
    if calls and calls[0] != "BasePress":
        raise ConfigError(f"{name} runs the model in passes of its own ({calls[0]}.__call__), which is not done here")
    if not (hasattr(press, "forward_hook") or hasattr(press, "compress")):
        raise ConfigError(f"a press has forward_hook or compress, as those of kvpress have, got {name}")
    if prepare := getattr(press, "post_init_from_model", None):
        _run(press, prepare, model)
    cache = to_cache(_copied(kv))  # a press may write to what it is given

    def choose(layer: Layer) -> torch.Tensor:
        given = {"cache_position": torch.arange(kv.num_positions), **layer.given, "past_key_values": cache}
        if hook := getattr(press, "forward_hook", None):
            _run(press, hook, layer.module, [], given, (None, layer.attentions))
            left = cache.layers[layer.number].keys, cache.layers[layer.number].values
        else:
            keys, values = (half[None].clone() for half in (layer.keys, layer.values))
            about = given["hidden_states"], keys, values, layer.attentions, given
            left = _run(press, press.compress, layer.module, *about)
            if not isinstance(left, tuple) or len(left) != 2:
                raise ConfigError(f"compress of {name} must return keys and values, got {type(left).__name__}")
        if getattr(layer.module, "masked_key_indices", None) is not None:
            layer.module.masked_key_indices = None
            raise ConfigError(f"{name} hides tokens and drops none; an engine knows no such mask")
        heads = zip(layer.keys, layer.values, left[0][0], left[1][0], strict=True)
        return torch.stack([_found(*halves, name) for halves in heads])

    return _chosen(model, kv, choose)


def _run(press: Any, function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{type(press).__name__} raised {type(error).__name__}: {said}") from error


def streaming(sinks: int = 4) -> Score:
    """StreamingLLM (arXiv 2309.17453): the first `sinks` tokens, and the latest."""

    def score(layer: Layer) -> torch.Tensor:
        places = torch.arange(layer.keys.shape[1], dtype=torch.float64)
        places[:sinks] += len(places)
        return places.expand(len(layer.keys), -1)

    return score


def knorm(layer: Layer) -> torch.Tensor:
    """Keys with a small norm (arXiv 2406.11430)."""
    sizes: torch.Tensor = layer.keys.float().norm(dim=-1)
    return -sizes


def snapkv(window: int = 32, pooled: int = 5) -> Score:
    """SnapKV (arXiv 2404.14469): what the last `window` tokens attend to, smoothed, and these tokens."""

    def score(layer: Layer) -> torch.Tensor:
        count = layer.keys.shape[1]
        if count <= window:
            raise ConfigError(f"SnapKV needs a prompt of more tokens than its window's {window}, got {count}")
        queries = layer.queries[:, -window:].float()
        if layer.turns:
            queries = _turned(queries, *(half[0, -window:] for half in layer.given["position_embeddings"]))
        attention: torch.Tensor = queries @ layer.shared(layer.keys.float()).transpose(1, 2) * layer.module.scaling
        later = torch.ones(window, count, dtype=torch.bool).triu(count - window + 1)
        attention = attention.masked_fill(later, -math.inf).softmax(-1)[..., :-window]
        seen = avg_pool1d(attention.mean(1), pooled, stride=1, padding=pooled // 2)
        return pad(layer.by_kv_head(seen), (0, window), value=math.inf)

    return score


def expected_attention(future: int = 512, sinks: int = 4) -> Score:
    """Expected attention (arXiv 2510.00636): what queries like the prompt's would attend to from the next `future`
    places, times the norm of V; and the first `sinks` tokens."""

    def score(layer: Layer) -> torch.Tensor:
        queries, count, width = layer.queries[:, sinks:].float(), layer.keys.shape[1], layer.keys.shape[2]
        if count <= sinks:
            raise ConfigError(f"expected attention needs a prompt of more tokens than its {sinks} sinks, got {count}")
        mean = queries.mean(1, keepdim=True)
        spread = (queries - mean).transpose(1, 2) @ (queries - mean) / queries.shape[1]
        if layer.turns:
            cos, sin = (half[0] for half in layer.module.rotary_emb(queries, torch.arange(count, count + future)[None]))
            turn = _turned(torch.eye(width)[:, None], cos, sin).mean(1).T  # of each channel, over the places
            mean, spread = mean @ turn.T, turn @ spread @ turn.T
        keys = layer.shared(layer.keys[:, sinks:].float())
        logits = (keys @ mean.transpose(1, 2))[..., 0] / math.sqrt(width)
        logits = logits + ((keys @ spread) * keys).sum(-1) / (2 * width)
        liked = layer.by_kv_head(logits.softmax(-1)) * layer.values[:, sinks:].float().norm(dim=-1)
        return pad(liked, (sinks, 0), value=math.inf)

    return score


def by_chance(seed: int = 0) -> Score:
    """Any tokens, each head its own: what a press has to beat."""

    def score(layer: Layer) -> torch.Tensor:
        return torch.rand(layer.keys.shape[:2], generator=torch.Generator().manual_seed(seed + layer.number))

    return score


PRESSES: dict[str, Score] = {
    "by chance": by_chance(),
    "StreamingLLM": streaming(),
    "KNorm": knorm,
    "SnapKV": snapkv(),
    "expected attention": expected_attention(),
}


# ----


@torch.inference_mode()
def _chosen(model: Any, kv: KV, choose: Callable[[Layer], torch.Tensor]) -> KV:
    """`kv` with the places that `choose` gives for each layer, (kv_heads, kept), the model computing its tokens."""
    if len(kv.token_ids) != kv.num_positions:
        raise ConfigError(
            f"a press computes the tokens of its KV, which names {len(kv.token_ids)} of {kv.num_positions}; "
            "`read` and `capture` name all"
        )
    frequencies = rope_of(model)
    found: list[torch.Tensor] = []

    def seen(module: Any, _: Any, given: dict[str, Any], returned: Any) -> None:
        keys, values = (half[len(found)].transpose(0, 1).clone() for half in (kv.keys, kv.values))
        turns = bool(frequencies[len(found)].any())
        found.append(choose(Layer(len(found), keys, values, module, given, returned[1], turns)))

    layers, rotary, kinds = getattr(model.base_model, "layers", []), rotary_of(model), layer_types(model)
    modules: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    if len(modules) != kv.num_layers or None in modules:
        raise ConfigError(
            f"presses take models whose {kv.num_layers} layers have a self_attn, not {type(model).__name__}"
        )
    for at, module in enumerate(modules):  # where presses look for it
        module.rotary_emb = partial(rotary, layer_type=kinds[at]) if kinds else rotary
    hooks = [module.register_forward_hook(seen, with_kwargs=True) for module in modules]
    try:
        model(torch.tensor([list(kv.token_ids)]), use_cache=True, logits_to_keep=1)
    finally:
        for hook, module in zip(hooks, modules, strict=True):
            hook.remove()
            del module.rotary_emb
    if len(counts := {places.shape[-1] for places in found}) > 1:
        raise ConfigError(
            f"layers keep {min(counts)} to {max(counts)} tokens, and an engine needs as many in each: it has one table "
            "of blocks for all of them"
        )
    return kept(kv, torch.stack(found), frequencies)


def _copied(kv: KV) -> KV:
    keys, values = (tuple(layer.clone() for layer in halves) for halves in (kv.keys, kv.values))
    return replace(kv, keys=keys, values=values)


def _found(keys: torch.Tensor, values: torch.Tensor, left_k: torch.Tensor, left_v: torch.Tensor, name: str) -> Any:
    """The places of those that are left of one head's keys and values, ascending."""
    places = {key.view(torch.uint8).numpy().tobytes(): at for at, key in enumerate(keys.contiguous())}
    found = [places.get(key.view(torch.uint8).numpy().tobytes(), -1) for key in left_k.contiguous()]
    chosen = -1 not in found and len(set(found)) == len(found) and len(places) == len(keys)
    if not chosen or not torch.equal(values[found], left_v):
        raise ConfigError(
            f"{name} changes keys or values, and only the choice of tokens can be taken over; of a press that turns "
            "keys (KeyRerotationPress) give the press within, as keys are turned here"
        )
    return torch.tensor(sorted(found))


def _turned(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rows (..., head_dim) turned as a layer turns them; channels beyond those of `cos` stay."""
    part, rest = rows[..., : cos.shape[-1]], rows[..., cos.shape[-1] :]
    a, b = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat([-b, a], dim=-1) * sin
    return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], dim=-1)
