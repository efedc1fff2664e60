"""Recurrent states in vLLM's pages: which groups hold them, and where a step leaves one.

A page of such a group holds a state and not tokens. Where vLLM's prefix cache is on (``mamba_cache_mode`` "align"), a
step that ends at the end of a block leaves the state behind that block's last token in the block's page; the next step
copies it to a page of its own before it changes it. vLLM offers each such page to its connector in the step that fills
it: `left_by`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from vllm.v1.core.sched import output as scheduler_output
from vllm.v1.kv_cache_interface import MambaSpec

from kvlab.errors import ConfigError
from kvlab.paged import PageLayout

StatePages: TypeAlias = Mapping[int, Mapping[int, int]]  # number of tokens -> group -> page of the state behind them


def specs_of(group: Any) -> list[Any]:
    """A group's specs: one, or one for each of its layers where they differ in size."""
    return list(getattr(group.kv_cache_spec, "kv_cache_specs", {}).values()) or [group.kv_cache_spec]


def is_recurrent(spec: Any) -> bool:
    return isinstance(spec, MambaSpec)


def recurrent_groups(groups: Sequence[Any]) -> frozenset[int]:
    """The KV cache groups whose pages hold states."""
    return frozenset(at for at, group in enumerate(groups) if any(map(is_recurrent, specs_of(group))))


def refuse_unserved(vllm_config: Any, groups: Sequence[Any], *, lossy: bool) -> None:
    """ConfigError where states are not kept at boundaries, or cannot be told from what lies in the same pages."""
    if not recurrent_groups(groups):
        return
    modes = {spec.mamba_cache_mode for group in groups for spec in specs_of(group) if is_recurrent(spec)}
    if modes != {"align"}:
        raise ConfigError(
            "this model has recurrent states, which vLLM keeps at boundaries of blocks only with its prefix cache; "
            f"add --enable-prefix-caching (mamba_cache_mode is {' and '.join(sorted(modes))!r})"
        )
    offers = getattr(scheduler_output, "KVConnectorBlockState", None)
    if not (is_dataclass(offers) and "boundary_state_offloads" in {field.name for field in fields(offers)}):
        raise ConfigError(
            "this model has recurrent states, and this version of vLLM does not tell connectors in which pages they "
            "lie; take a newer one (0.32 does), or run it without the connector"
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "this model has recurrent states, which are not kept with speculative decoding: a step may leave the "
            "state behind tokens that are refused; turn one off"
        )
    if lossy:
        raise ConfigError(
            "this model has recurrent states, and no serde with a loss takes them: what a state loses stays in all "
            "states behind it; use naive or lossless"
        )


def left_by(output: Any) -> dict[str, dict[int, dict[int, int]]]:
    """Of each request: the states that the step leaves, and the pages in which they lie until it ends."""
    found: dict[str, dict[int, dict[int, int]]] = {}
    offers = getattr(output, "kv_connector_block_state", None)
    for request_id, of_request in (offers.boundary_state_offloads if offers is not None else {}).items():
        states: defaultdict[int, dict[int, int]] = defaultdict(dict)
        for group, page, num_tokens in of_request:
            states[num_tokens][group] = page
        found[request_id] = dict(states)
    return found


def shared_tokens(request: Any) -> int:
    """How much of a new request's prompt others share, where its states are not in vLLM's prefix cache; 0: nothing."""
    return int(getattr(request, "shared_prefix_boundary", 0))


def stop_at(request: Any, num_computed: int, *ends: int) -> None:
    """Let no step of this request's prompt, of which `num_computed` tokens are computed, run past the next of `ends`,
    so that one ends there; and have the state there offered, where vLLM offers few. It has such a stop for the end of a
    prefix that prompts share (`shared_tokens`), which is moved."""
    request.shared_prefix_boundary = min((end for end in ends if end > num_computed), default=0)


def content_bytes(groups: Sequence[Any]) -> dict[str, int]:
    """Layer name -> bytes of its state, of layers that have one: the rest of the page is padding."""
    found: dict[str, int] = {}
    for group in groups:
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for layer in group.layer_names:
            if is_recurrent(spec := specs.get(layer, group.kv_cache_spec)):
                found[layer] = sum(
                    torch.Size(shape).numel() * dtype.itemsize
                    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
                )
    return found


def described(group: Any) -> list[str]:
    """What the bytes of a group's states mean."""
    return sorted(
        {f"{spec.mamba_type}/{spec.shapes}/{spec.dtypes}/{spec.mamba_cache_mode}" for spec in specs_of(group)}
    )


class Padding:
    """The bytes of pages that a group's states do not fill: what other groups' pages left there. They are cleared when
    a page becomes a state's, without touching the state."""

    def __init__(self, layout: PageLayout, kv_caches: Mapping[str, torch.Tensor], groups: Sequence[Any]) -> None:
        sizes = content_bytes(groups)
        self._behind: dict[int, list[torch.Tensor]] = {}  # by group
        for at in recurrent_groups(groups):
            filled = {kv_caches[layer].data_ptr(): sizes[layer] for layer in groups[at].layer_names}
            views = [pages[:, filled.get(pages.data_ptr(), 0) :] for pages in layout.pages]
            self._behind[at] = [view for view in views if view.shape[1]]

    def clear(self, pages: Mapping[int, Sequence[int]]) -> None:
        """Fill the padding of these pages, by group, with zeros, before the engine's next work."""
        for group, page_ids in pages.items():
            for view in self._behind[group]:
                if view.device.type == "cpu":  # as CPUTransfer does: torch would start a team of threads
                    view.numpy()[list(page_ids)] = 0
                else:
                    view.index_fill_(0, torch.tensor(page_ids, device=view.device), 0)
