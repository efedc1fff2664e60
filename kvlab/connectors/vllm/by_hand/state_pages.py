"""The states of recurrent layers in the engine's own pages, read and written as tensors.

A page holds one state of all tokens so far. The state behind a request's first ``n`` computed tokens lies in the page
of the block of token ``n - 1``; the next step begins from there. The engine gives each such layer views of its parts
(the inputs of a convolution, the state itself), first axis: pages. They are used as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvlab.connectors.captured import KV, States
from kvlab.connectors.vllm.kv_groups import NO_PAGE, KVGroups, Tables
from kvlab.errors import ConfigError


@dataclass(frozen=True)
class StateLayer:
    """One recurrent layer. `parts`: the engine's views, (pages, ...) each."""

    name: str
    group: int
    parts: tuple[torch.Tensor, ...]


class StateLayers:
    """All recurrent layers, in the model's order."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, groups: KVGroups) -> None:
        modules = vllm_config.compilation_config.static_forward_context
        self._block_tokens = groups.block_tokens
        found = [
            StateLayer(name, at, tuple(modules[name].kv_cache))
            for at in groups.recurrent
            for name in kv_cache_config.kv_cache_groups[at].layer_names
        ]
        self.layers = tuple(sorted(found, key=lambda layer: layer_number(layer.name)))

    def __len__(self) -> int:
        return len(self.layers)

    def read(self, block_ids: Tables, num_tokens: int) -> States:
        """Copies of the states behind `num_tokens` tokens, where the request has computed no more."""
        pages = [self._page(block_ids, layer, num_tokens) for layer in self.layers]
        return tuple(
            tuple(part[page].cpu().clone() for part in layer.parts)
            for layer, page in zip(self.layers, pages, strict=True)
        )

    def write(self, states: States, block_ids: Tables, num_tokens: int) -> None:
        """Have the request go on from `states` behind `num_tokens` tokens."""
        for layer, own in zip(self.layers, states, strict=True):
            page = self._page(block_ids, layer, num_tokens)
            for part, tensor in zip(layer.parts, own, strict=True):
                part[page].copy_(tensor)

    def check(self, kv: KV, num_tokens: int) -> None:
        """ConfigError unless `kv` holds the states that a prompt of `num_tokens` tokens, or a longer one, goes on from,
        and no others, every number finite."""
        wanted = {num_tokens, max(num_tokens - 1, 1)} if self.layers else set()
        if set(kv.states) != wanted:
            raise ConfigError(
                f"KV of {num_tokens} tokens must hold states behind {_listed(wanted)}, got {_listed(set(kv.states))}"
            )
        for end, states in kv.states.items():
            if len(states) != len(self.layers):
                raise ConfigError(
                    f"states of {len(states)} layers do not fit this engine's {len(self.layers)} recurrent ones"
                )
            for layer, own in zip(self.layers, states, strict=True):
                want = [f"{part.dtype}{list(part.shape[1:])}" for part in layer.parts]
                got = [f"{part.dtype}{list(part.shape)}" for part in own]
                if got != want:
                    raise ConfigError(f"the state of {layer.name} must be {', '.join(want)}; got {', '.join(got)}")
                if not all(bool(part.isfinite().all()) for part in own):
                    raise ConfigError(
                        f"the state of {layer.name} behind {end} tokens holds NaN or infinity, which would reach every "
                        "answer"
                    )

    def _page(self, block_ids: Tables, layer: StateLayer, num_tokens: int) -> int:
        page = block_ids[layer.group][(num_tokens - 1) // self._block_tokens]
        if page == NO_PAGE:
            raise ConfigError(f"the engine has no state of {layer.name} behind {num_tokens} tokens")
        return page


def layer_number(name: str) -> tuple[int, str]:
    """The layer's place in the model: the number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0), name


def _listed(ends: set[int]) -> str:
    return f"{' and '.join(map(str, sorted(ends)))} tokens" if ends else "none"
