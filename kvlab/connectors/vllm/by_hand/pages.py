"""Every layer's KV in the engine's own pages, read and written as tensors.

Which byte is which is not guessed: each layer's write operator proves it on scratch pages (`kvlab.paged.probe`). A
layer whose pages are not proven to hold plain K and V is refused with the reason. Recurrent layers: `state_pages`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlab.connectors.captured import KV
from kvlab.connectors.vllm import compat
from kvlab.connectors.vllm.by_hand.state_pages import StateLayers, layer_number
from kvlab.connectors.vllm.kv_groups import NO_PAGE, KVGroups, Tables
from kvlab.connectors.vllm.pages import layer_maps
from kvlab.errors import ConfigError
from kvlab.paged import Opaque, PageLayout, PageMap, TypedPages

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DRAFT = "draft_model."  # how the engine calls layers of a draft model


@dataclass(frozen=True)
class LayerPages:
    """One layer's pages. `group` is its KV cache group; `window`: how many tokens it sees; None: all."""

    name: str
    group: int
    window: int | None
    pages: TypedPages

    @property
    def map(self) -> PageMap:
        return self.pages.map


class EnginePages:
    """The pages of all layers, in the model's order: `layers` attend, `states` are recurrent.

    A draft model's KV is none of it: what is written clears the draft's pages, so its drafts are refused until it has
    read on, and what the engine says is the model's own.

    Parameters
    ----------
    vllm_config, kv_cache_config
        the engine's own
    kv_caches
        layer name -> the engine's tensor, as it registered them
    layout
        pages of these
    groups
        the engine's KV cache groups

    Raises
    ------
    ConfigError
        where the pages of a layer are not proven to hold plain numbers of K and V
    """

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any], layout: PageLayout, groups: KVGroups
    ) -> None:
        self.block_tokens = groups.block_tokens
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        groups_of = {
            name: at
            for at, group in enumerate(kv_cache_config.kv_cache_groups)
            for name in group.layer_names
            if name in kv_caches and at not in groups.recurrent  # or it reads the KV of another layer
        }
        places = {address: at for at, address in enumerate(layout.addresses)}
        alone = {
            name: PageLayout((name,), (layout.pages[places[kv_caches[name].data_ptr()]],), layout.name)
            for name in groups_of
        }
        page_bytes = {name: each.page_bytes for name, each in alone.items()}
        drafts = [name for name in groups_of if name.startswith(DRAFT)]
        if compat.drafts_have_kv(vllm_config) and not drafts:
            raise ConfigError("the layers of this engine's draft model cannot be told from the model's own")
        attend = {name: kv_caches[name] for name in groups_of if name not in drafts}
        maps = layer_maps(vllm_config, kv_cache_config, attend, page_bytes)
        unknown = Opaque("the engine does not know it")
        layers = [
            LayerPages(name, at, groups.windows[at], TypedPages(alone[name], _plain(name, maps.get(name, unknown)), 1))
            for name, at in groups_of.items()
            if name in attend
        ]
        self.layers = tuple(sorted(layers, key=lambda layer: layer_number(layer.name)))
        self._drafts = [(groups_of[name], alone[name].pages[0]) for name in drafts]
        self.states = StateLayers(vllm_config, kv_cache_config, groups)

    def __repr__(self) -> str:
        attend = [f"{len(self.layers)} layers, {self.layers[0].map}"] if self.layers else []
        recur = [f"{len(self.states)} recurrent layers"] if self.states else []
        return f"EnginePages({', '.join(attend + recur)})"

    @property
    def have_windows(self) -> bool:
        return any(layer.window for layer in self.layers)

    def read(self, block_ids: Tables, token_ids: Sequence[int], model: str) -> KV:
        """The KV of `token_ids`, whose pages are `block_ids` of each group. Of a layer with a window, the tokens that
        the engine has kept of those that the last one sees."""
        count = len(token_ids)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a load may be under way on a stream of its own
        keys, values, windows = [], [], []
        for layer in self.layers:
            table = block_ids[layer.group][: -(-count // self.block_tokens)]
            kept = 0  # blocks that the window has left behind
            while kept < len(table) and table[kept] == NO_PAGE:
                kept += 1
            first = kept * self.block_tokens
            typed = layer.pages.read(table[kept:], count - first)[0]
            if layer.window is not None:
                typed = typed[max(count - layer.window - first, 0) :]
            keys.append(typed[:, :, 0].cpu().contiguous())
            values.append(typed[:, :, 1].cpu().contiguous())
            windows.append(layer.window)
        states = {count: self.states.read(block_ids, count)} if self.states else {}
        seen = tuple(windows) if any(windows) else ()
        return KV(tuple(keys), tuple(values), tuple(token_ids), count, model, seen, states)

    def write(self, kv: KV, block_ids: Tables, first_token: int, end_token: int) -> None:
        """Write tokens [first_token, end_token) of `kv` into the pages of a request, and the states behind them;
        `first_token` begins a block."""
        for layer, key, value in zip(self.layers, kv.keys, kv.values, strict=True):
            typed = torch.stack([key, value], dim=2)[None]
            missing = kv.num_positions - typed.shape[1]  # tokens that the layer's window has left behind
            start, end = first_token // self.block_tokens, -(-end_token // self.block_tokens)
            table = block_ids[layer.group][start:end]
            while table and (table[0] == NO_PAGE or (start + 1) * self.block_tokens <= missing):
                table, start = table[1:], start + 1
            first = start * self.block_tokens
            piece = typed[:, max(first - missing, 0) : end_token - missing]
            if first < missing:  # a block that begins before the window: what no token sees any more
                piece = torch.cat([piece.new_zeros(1, missing - first, *piece.shape[2:]), piece], dim=1)
            if (
                table and self.states
            ):  # the engine clears no page that is filled before its step: states of others lie in it
                layer.pages.layout.pages[0][list(table)] = 0
            if table:
                layer.pages.write(piece, table)
        for group, pages in self._drafts:
            pages[list(block_ids[group][first_token // self.block_tokens : -(-end_token // self.block_tokens)])] = 0
        if self.states:
            self.states.write(kv.states[end_token], block_ids, end_token)

    def shown(self, kv: KV) -> KV:
        """`kv` without what windows no longer show, where it holds all tokens of every layer (`kvlab.capture`)."""
        windows = tuple(layer.window for layer in self.layers)
        if kv.windows or not any(windows) or kv.num_layers != len(windows):
            return kv
        keys, values = (
            tuple(layer[-(window or 0) :] for layer, window in zip(halves, windows, strict=True))
            for halves in (kv.keys, kv.values)
        )
        return replace(kv, keys=keys, values=values, windows=windows)

    def check(self, kv: KV, num_tokens: int) -> None:
        """ConfigError unless `kv` is KV of `num_tokens` tokens in these layers, and every number of it finite."""
        if kv.num_layers != len(self.layers):
            raise ConfigError(f"KV of {kv.num_layers} layers does not fit this engine's {len(self.layers)}")
        if kv.num_positions != num_tokens:
            raise ConfigError(f"KV of {kv.num_positions} tokens does not fit a prompt of {num_tokens}")
        for at, (layer, *halves) in enumerate(zip(self.layers, kv.keys, kv.values, strict=True)):
            held = num_tokens if layer.window is None else min(num_tokens, layer.window)
            want = (held, layer.map.kv_heads, layer.map.head_dim)
            for letter, half in zip("KV", halves, strict=True):
                if tuple(half.shape) != want or half.dtype != layer.map.element:
                    raise ConfigError(
                        f"{letter} of layer {at} must be {layer.map.element}{list(want)}, "
                        f"got {half.dtype}{list(half.shape)}"
                    )
                if not bool(half.isfinite().all()):
                    raise ConfigError(f"{letter} of layer {at} holds NaN or infinity, which would reach every answer")
        windows = tuple(layer.window for layer in self.layers)
        if kv.windows and kv.windows != (windows if any(windows) else ()):
            raise ConfigError(f"KV of windows {kv.windows} does not fit this engine's layers, {windows}")
        self.states.check(kv, num_tokens)


def _plain(name: str, found: PageMap | Opaque) -> PageMap:
    """The map of a layer whose pages hold plain numbers of K and V."""
    if isinstance(found, Opaque):
        raise ConfigError(f"the pages of layer {name} cannot be read as K and V: {found.reason}")
    if found.is_latent:
        raise ConfigError(f"the pages of layer {name} hold latents (MLA), one vector for K and V; not read yet")
    if found.element not in FLOATS:
        raise ConfigError(
            f"the pages of layer {name} hold {found.element}, numbers by a scale that is kept elsewhere; "
            "start the engine with kv_cache_dtype='auto'"
        )
    return found
