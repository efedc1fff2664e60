"""How far is what host memory holds from what the engine computes? Compared block by block, for `quality_check`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlab.codecs.blocks import BlockCodec
from kvlab.connectors.vllm.messages import CheckOp, CheckRow
from kvlab.connectors.vllm.worker.model_weights import ModelWeights
from kvlab.connectors.vllm.worker.reports import Reports
from kvlab.errors import ConfigError
from kvlab.paged import Opaque, PageMap, Transfer

logger = logging.getLogger("vllm.kvlab")
_cuda: Any = torch.cuda  # whose events have no types
MOST = 1000.0  # of an error that is told; no number at all counts as one
TOO_FAR = 0.5  # of what differs between tokens: attention cannot tell them apart any more
PLANES = {1: ("latent",), 2: ("k", "v")}


@dataclass
class _Taken:
    """What a page and a slot held. `ended`: an event, once the page is in host memory; None: it is."""

    op: CheckOp
    pages: torch.Tensor
    slot: torch.Tensor
    ended: Any


class QualityChecks:
    """Takes copies of a computed block's pages and of the slot that holds the same block, and compares them. A GPU's
    pages come while the engine goes on; they are compared in a later step.

    Raises
    ------
    ConfigError
        where it is not known what lies where in a page
    """

    def __init__(self, transfer: Transfer, page_map: PageMap | Opaque, codec: BlockCodec | None) -> None:
        if isinstance(page_map, Opaque):
            raise ConfigError(
                f"quality_check compares K and V, and these pages are opaque: {page_map.reason}; set quality_check to 0"
            )
        self._transfer, self._map, self._codec = transfer, page_map, codec
        self._taken: list[_Taken] = []
        self._has_warned = False

    def step(
        self, ops: Sequence[CheckOp], owners: Sequence[int | None], weights: ModelWeights, reports: Reports
    ) -> None:
        """The step's forward pass is under way: compare `ops` behind it. `owners`: the generation of each slot."""
        for op in ops:
            if owners[op.slot] == op.generation and not weights.are_other_than(op.adapter):
                self._taken.append(self._take(op))
        waiting, self._taken = self._taken, []
        for taken in waiting:
            if taken.ended is not None and not taken.ended.query():
                self._taken.append(taken)
                continue
            row = self._compared(taken)
            self._warn(row)
            reports.current.checks.append(row)

    def _take(self, op: CheckOp) -> _Taken:
        slot = self._transfer.slots([op.slot])[0].clone()
        pages = torch.stack([layer[op.block_id] for layer in self._transfer.layout.pages])
        if pages.device.type != "cuda":
            return _Taken(op, pages, slot, None)
        host = torch.empty(pages.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(pages, non_blocking=True)
        ended = _cuda.Event()
        ended.record()
        return _Taken(op, host, slot, ended)

    def _compared(self, taken: _Taken) -> CheckRow:
        tokens = self._map.block_tokens
        held = taken.slot.view(taken.pages.shape) if self._codec is None else torch.zeros_like(taken.pages)
        if self._codec is not None:
            self._codec.decode(taken.slot, tokens, held)
        errors = errors_of(*(self._map.read(pages[None], tokens) for pages in (taken.pages, held)))
        names = PLANES[errors.shape[1]]
        worst = errors.amax(0).tolist()
        return CheckRow(taken.op.request_id, dict(zip(names, worst, strict=True)), int(errors.amax(1).argmax()))

    def _warn(self, row: CheckRow) -> None:
        name, error = max(row.errors.items(), key=lambda pair: pair[1])
        if error > TOO_FAR and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "kvlab: host memory differs from what is computed by %.2g of what differs between tokens (%s of layer "
                "%d): this serde does not fit the model, or what is held is not its KV",
                error,
                name,
                row.worst_layer,
            )


def errors_of(computed: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """By layer and plane (layers, kv) of typed KV (layers, tokens, kv_heads, kv, head_dim): the root mean square of the
    difference, in units of what differs between the tokens of `computed`. A constant of a channel is no difference."""
    true, other = computed.float(), held.float()
    apart = (true - true.mean(1, keepdim=True)).square().mean((1, 2, 4))
    error = (other - true).square().mean((1, 2, 4))
    relative = torch.where(error > 0, error / apart, error).sqrt()
    return relative.nan_to_num(nan=MOST, posinf=MOST).clamp(max=MOST)
