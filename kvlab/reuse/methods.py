"""Ways to make the KV of a context out of the KV of its pieces.

Each piece was computed alone, so it knows nothing of the pieces before it, and its keys are turned for positions from
0 on. Turning keys to their place is arithmetic (RoPE is a rotation). What no arithmetic gives is attention to earlier
pieces: some tokens are computed again over what is there, and the methods differ in which.

`cacheblend` chooses those whose KV in the second layer differs most from the true one, which costs computing the first
layers of all tokens (arXiv 2405.16444); `epic` the first of each piece (arXiv 2410.15332); `random` is what a choice
has to beat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import from_cache, to_cache, windows_of
from kvlab.errors import ConfigError
from kvlab.reuse.rope import rope_of, turn

JUDGED_LAYER = 1  # the first whose KV depends on other tokens


@dataclass(frozen=True)
class Case:
    """A context of `pieces`, each computed alone, and its KV `whole` computed as one prompt."""

    model: Any
    pieces: Sequence[KV]
    whole: KV

    @property
    def starts(self) -> list[int]:
        """The place of each piece's first token."""
        found, at = [], 0
        for piece in self.pieces:
            found.append(at)
            at += piece.num_positions
        return found


@dataclass(frozen=True)
class Made:
    """A context's KV, and how many of its tokens' layers were computed for it, as a share of all."""

    kv: KV
    computed: float


Method = Callable[[Case], Made]


def naive(case: Case) -> Made:
    """The pieces one behind the other, keys as they are."""
    return Made(pasted(case.pieces), 0.0)


def rerope(case: Case) -> Made:
    """The same with keys turned to their place."""
    frequencies = rope_of(case.model)
    moved = [turned(piece, start, frequencies) for piece, start in zip(case.pieces, case.starts, strict=True)]
    return Made(pasted(moved), 0.0)


def epic(tokens: int) -> Method:
    """`rerope`, and the first `tokens` of each piece but the first computed again."""

    def method(case: Case) -> Made:
        spans = zip(case.starts[1:], case.pieces[1:], strict=True)
        chosen = [at for start, piece in spans for at in range(start, start + min(tokens, piece.num_positions))]
        return _again(case, rerope(case).kv, chosen)

    return method


def cacheblend(share: float) -> Method:
    """`rerope`, and the `share` of tokens computed again whose KV in the second layer is off most."""

    def method(case: Case) -> Made:
        kv = rerope(case).kv
        off = deviation(kv, case.whole)
        count = min(round(share * len(off)), int((off > 0).sum()))
        made = _again(case, kv, sorted(off.topk(count).indices.tolist()))
        # The first layers of all tokens are computed for the choice, and so the judged one's KV is the true one.
        layers = kv.num_layers
        keys, values = list(made.kv.keys), list(made.kv.values)
        keys[JUDGED_LAYER], values[JUDGED_LAYER] = case.whole.keys[JUDGED_LAYER], case.whole.values[JUDGED_LAYER]
        judged = KV(tuple(keys), tuple(values), kv.token_ids, kv.num_positions, kv.model)
        return Made(judged, made.computed + (1 - made.computed) * JUDGED_LAYER / layers)

    return method


def block_attention(case: Case) -> Made:
    """`rerope`, and the last piece computed again with all of the others in sight: what a model trained for
    block attention (arXiv 2409.15355) computes, by one that is not."""
    return _again(case, rerope(case).kv, range(case.starts[-1], case.whole.num_positions))


def at_random(share: float, seed: int = 0) -> Method:
    """`rerope`, and a `share` of tokens computed again that nothing chose."""

    def method(case: Case) -> Made:
        kv = rerope(case).kv
        source = torch.Generator().manual_seed(seed)
        order = torch.randperm(kv.num_positions, generator=source)
        return _again(case, kv, sorted(order[: round(share * kv.num_positions)].tolist()))

    return method


def full(case: Case) -> Made:
    """All of it computed: what the others are measured against."""
    return Made(case.whole, 1.0)


METHODS: dict[str, Method] = {
    "naive paste": naive,
    "re-RoPE": rerope,
    "random 15%": at_random(0.15),
    "block attention, untrained": block_attention,
    "EPIC 8": epic(8),
    "EPIC 32": epic(32),
    "CacheBlend 15%": cacheblend(0.15),
    "CacheBlend 30%": cacheblend(0.30),
    "full": full,
}


# ---- what they are made of


def pasted(pieces: Sequence[KV]) -> KV:
    """KV of pieces, one behind the other. Of layers with a window, what the last token sees of them."""
    if not pieces:
        raise ConfigError("a context needs at least one piece, got none")
    for piece in pieces:
        _of_tokens(piece)
    if len({piece.windows for piece in pieces}) > 1:
        raise ConfigError("pieces must all be of the same windows; read all of them from one engine")
    kinds = [[(tuple(layer.shape[1:]), layer.dtype) for layer in (*piece.keys, *piece.values)] for piece in pieces]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            "pieces must all have the same layers, KV heads, head_dim and dtype; read all of them from one model"
        )
    windows = pieces[0].windows
    keys, values = (
        tuple(
            torch.cat(layer)[-(window or 0) :]
            for layer, window in zip(
                zip(*(getattr(piece, half) for piece in pieces), strict=True),
                windows or [None] * pieces[0].num_layers,
                strict=True,
            )
        )
        for half in ("keys", "values")
    )
    tokens = tuple(token for piece in pieces for token in piece.token_ids)
    return KV(keys, values, tokens, len(tokens), pieces[0].model, windows)


def turned(kv: KV, by: int | torch.Tensor, frequencies: torch.Tensor) -> KV:
    """`kv` with its keys `by` positions further on: all of them by a number, or each by its own, (tokens).

    `frequencies`: of `rope_of`, (layers, pairs), or (pairs) for all layers.
    """
    _of_tokens(kv)
    steps = _whole(by, "places that keys are turned by").reshape(-1, 1)
    if len(steps) not in (1, kv.num_positions):
        raise ConfigError(
            f"keys of {kv.num_positions} tokens must be turned by one number or by as many, got {len(steps)}"
        )
    rows = zip(kv.keys, _by_layer(frequencies, kv), strict=True)
    return replace(kv, keys=tuple(turn(layer, steps[-len(layer) :], own) for layer, own in rows))


def kept(kv: KV, places: Sequence[int] | torch.Tensor, frequencies: torch.Tensor) -> KV:
    """The tokens at `places`, ascending, as a shorter prompt: their keys are turned to the places they come to.

    `places` of all layers and heads, or an integer tensor (layers, kv_heads, kept) where each head keeps tokens of its
    own. Then ``token_ids`` are those that most heads keep, which name the prompt and compute nothing. `frequencies` as
    in `turned`.
    """
    _of_tokens(kv)
    if any(len(layer) != kv.num_positions for layer in kv.keys):
        raise ConfigError("tokens are kept of KV that holds all of them in each layer; `kvlab.capture` gives it")
    heads = kv.keys[0].shape[1]
    chosen = _whole(places if isinstance(places, torch.Tensor) else list(places), "places to keep")
    if chosen.ndim == 1:
        chosen = chosen.expand(kv.num_layers, heads, -1)
    if chosen.shape[:-1] != (kv.num_layers, heads):
        wanted = f"({kv.num_layers}, {heads}, kept)"
        raise ConfigError(f"places to keep must be of all heads, or {wanted}; got {tuple(chosen.shape)}")
    outside = not chosen.numel() or int(chosen.min()) < 0 or int(chosen.max()) >= kv.num_positions
    if outside or bool((chosen.diff() <= 0).any()):
        raise ConfigError(f"places to keep must ascend within 0 to {kv.num_positions - 1}")

    def part(layer: torch.Tensor, at: int) -> torch.Tensor:
        return layer.gather(0, chosen[at].T[..., None].expand(-1, -1, layer.shape[2]))

    count = chosen.shape[-1]
    keys = tuple(
        turn(part(layer, at), torch.arange(count)[:, None] - chosen[at].T, own)
        for at, (layer, own) in enumerate(zip(kv.keys, _by_layer(frequencies, kv), strict=True))
    )
    values = tuple(part(layer, at) for at, layer in enumerate(kv.values))
    liked = torch.bincount(chosen.flatten(), minlength=kv.num_positions)
    names = liked.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return KV(keys, values, tuple(kv.token_ids[at] for at in names), count, kv.model)


@torch.inference_mode()
def recomputed(model: Any, kv: KV, chosen: Sequence[int]) -> KV:
    """`kv` with the tokens `chosen`, ascending, computed again in all layers: each sees what is there of the tokens
    before it, and of those chosen what was computed just now. Layers with a window see no further than that."""
    _of_tokens(kv)
    if not chosen:
        return kv
    if any(len(layer) != kv.num_positions for layer in kv.keys):
        raise ConfigError("tokens are computed again over KV that holds all of them in each layer")
    count, places = kv.num_positions, torch.tensor(chosen)
    if places[0] < 0 or places[-1] >= count or bool((places.diff() <= 0).any()):
        raise ConfigError(f"tokens to compute again must ascend within 0 to {count - 1}")
    stale = torch.zeros(count, dtype=torch.bool)
    stale[places] = True
    old = (torch.arange(count) < places[:, None]) & ~stale
    new = places[None] <= places[:, None]
    sees, far = torch.cat([old, new], dim=1), places[:, None] - torch.cat([torch.arange(count), places])
    ids = torch.tensor([[kv.token_ids[at] for at in chosen]])
    cache = to_cache(kv)
    masks = _masks(model, sees, far, kv.keys[0].dtype)
    model(ids, past_key_values=cache, position_ids=places[None], attention_mask=masks, use_cache=True)
    after = from_cache(cache, list(kv.token_ids) + [0] * len(chosen))

    def placed(old: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        out = old.clone()
        out[places] = grown[count:]
        return out

    keys = tuple(placed(a, b) for a, b in zip(kv.keys, after.keys, strict=True))
    values = tuple(placed(a, b) for a, b in zip(kv.values, after.values, strict=True))
    return KV(keys, values, kv.token_ids, count, kv.model)


def _masks(model: Any, sees: torch.Tensor, far: torch.Tensor, dtype: torch.dtype) -> Any:
    """What each token attends to, (1, 1, tokens, keys), as `model` takes it: by the kind of its layers where they
    differ in how far they see. `far`: how many places each key lies before the token."""
    windows = windows_of(model)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(windows)
    found = {}
    for kind, window in zip(kinds, windows, strict=True):
        seen = sees if window is None else sees & (far < window)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        found[kind] = mask[None, None]
    if not set(found) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(f"tokens are not computed again in layers of {', '.join(sorted(found))}")
    return found if len(found) > 1 else next(iter(found.values()))


def _by_layer(frequencies: torch.Tensor, kv: KV) -> torch.Tensor:
    """(layers, pairs)"""
    if not isinstance(frequencies, torch.Tensor) or frequencies.dtype not in (torch.float64, torch.float32):
        got = frequencies.dtype if isinstance(frequencies, torch.Tensor) else type(frequencies).__name__
        raise ConfigError(f"a rope must be the float64 tensor of radians that `rope_of` gives, got {got}")
    if frequencies.ndim not in (1, 2) or not bool(frequencies.isfinite().all()):
        raise ConfigError(f"a rope must be finite radians, (layers, pairs), got shape {list(frequencies.shape)}")
    widest, narrowest = 2 * frequencies.shape[-1], min(layer.shape[-1] for layer in kv.keys)
    if widest > narrowest:
        raise ConfigError(f"a rope of {widest // 2} pairs turns {widest} channels, but heads have {narrowest}")
    if frequencies.ndim == 2 and len(frequencies) != kv.num_layers:
        raise ConfigError(f"a rope of {len(frequencies)} layers does not fit KV of {kv.num_layers}")
    return frequencies.expand(kv.num_layers, -1)


def _whole(numbers: Any, what: str) -> torch.Tensor:
    """`numbers` as int64; ConfigError where they are none, or fractions."""
    try:
        found = torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} must be whole numbers, got {numbers!r:.80}") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise ConfigError(f"{what} must be whole numbers, got {found.dtype}")
    return found.to(torch.int64)


def _of_tokens(kv: KV) -> None:
    """ConfigError where `kv` is no KV, or holds more than tokens."""
    if not isinstance(kv, KV):
        raise ConfigError(f"KV must be what `read` and `capture` give, got {type(kv).__name__}")
    if kv.states:
        raise ConfigError(
            "recurrent states are of all tokens before them in their order: they cannot be moved, pasted or pruned"
        )


def deviation(kv: KV, whole: KV, layer: int = JUDGED_LAYER) -> torch.Tensor:
    """How far each token's K and V in one layer lie from the true ones, relative to the layer's: float64 (tokens)."""
    total = torch.zeros(kv.num_positions, dtype=torch.float64)
    for ours, true in ((kv.keys, whole.keys), (kv.values, whole.values)):
        wrong, size = (ours[layer] - true[layer]).double(), true[layer].double()
        total += wrong.square().sum((1, 2)) / size.square().sum((1, 2)).mean()
    return total


def _again(case: Case, kv: KV, chosen: Sequence[int]) -> Made:
    return Made(recomputed(case.model, kv, chosen), len(chosen) / kv.num_positions)
