"""The messages between scheduler side and workers, once per engine step. They pickle: these may be two processes."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvlab.connectors.vllm.adapters import LoadedAdapter


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it was when a request was named: `num_loads` counts how often other weights came under
    `adapter_id` in this engine. Copies are made only while the weights in use are these."""

    adapter_id: int
    num_loads: int


@dataclass
class LoadOp:
    """Copy blocks of one object, which serve `num_tokens` of the request, into pages: the slots `picked` into the pages
    `block_ids`. The object holds tokens [first_token, end_token) of the prompt in `slots`, which are of `generation`;
    with `fetch`, a worker fills them from the secondary tiers first."""

    hash: bytes
    generation: int
    slots: tuple[int, ...]
    picked: tuple[int, ...]
    block_ids: tuple[int, ...]
    first_token: int
    end_token: int
    num_tokens: int
    fetch: bool = False


@dataclass
class RequestLoad:
    """All loads of one request. `is_async`: between steps, reported when done; else while the step is planned.
    `lost_blocks` are pages that were promised and cannot be filled: the engine must compute them. `version` is that of
    the namespace (see `Scheduler.reset`)."""

    request_id: str
    ops: list[LoadOp]
    prompt_tokens: int
    is_async: bool
    lost_blocks: list[int] = field(default_factory=list)
    version: str = ""
    adapter: Adapter | None = None

    @property
    def pages(self) -> list[int]:
        """All pages that the hit promised."""
        return self.lost_blocks + [block for op in self.ops for block in op.block_ids]

    @property
    def num_tokens(self) -> int:
        """Tokens that the hit promised."""
        return sum(op.num_tokens for op in self.ops)

    @property
    def row(self) -> dict[str, Any]:
        """What is told of a load from memory that filled them all; a worker's report adds how long it took."""
        return {"hit_tokens": self.num_tokens, "tier": "memory"}


@dataclass
class SaveOp:
    """Copy the pages `block_ids`, tokens [first_token, end_token) of the prompt, into `slots`, which are of
    `generation`; with `write`, also write the object to the secondary tiers."""

    hash: bytes
    generation: int
    slots: tuple[int, ...]
    block_ids: tuple[int, ...]
    first_token: int
    end_token: int
    write: bool
    version: str = ""
    adapter: Adapter | None = None


@dataclass
class CheckOp:
    """Compare the page `block_id`, which the step has computed in full, with the slot of `generation` that holds the
    same block."""

    request_id: str
    generation: int
    slot: int
    block_id: int
    adapter: Adapter | None = None


@dataclass
class CheckRow:
    """What a comparison found: the error of each plane (k, v, or latent) in its worst layer, in units of what differs
    between tokens; and the layer that is worst of all."""

    request_id: str
    errors: dict[str, float]
    worst_layer: int


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's copies but for loads within it. `num_tokens` are those the step computes, `prefill_tokens` those of
    them that belong to prompts; `new_blocks` are the pages that requests have been given for it; those in
    `unclean_blocks` are to be cleared before it, as an object will hold more of them than tokens write; of
    `state_pages`, by KV cache group, only what their states do not fill. `version` is that of the namespace by now:
    loads that began under another one are lost."""

    loads: list[RequestLoad] = field(default_factory=list)
    saves: list[SaveOp] = field(default_factory=list)
    num_tokens: int = 0
    prefill_tokens: int = 0
    new_blocks: list[int] = field(default_factory=list)
    unclean_blocks: list[int] = field(default_factory=list)
    state_pages: dict[int, list[int]] = field(default_factory=dict)
    version: str = ""
    checks: list[CheckOp] = field(default_factory=list)


@dataclass
class LoadRow:
    """One request's load as measured by a worker: `seconds` from the beginning to the end of the copy, `delay` those by
    which it held up the engine, which may still have been computing when the copy began; or, between steps, the
    request, which may have waited for others' loads. `tier`: where the KV lay, ``memory``, a secondary tier's name, or
    several joined by ``+``."""

    request_id: str
    num_tokens: int
    num_bytes: int
    seconds: float
    tier: str
    delay: float

    @property
    def told(self) -> dict[str, Any]:
        """Of the request's row."""
        return {
            "bytes": self.num_bytes, "ms": self.seconds * 1e3, "tier": self.tier, "hit_tokens": self.num_tokens,
        }  # fmt: skip


@dataclass
class TierRow:
    """A secondary tier: what it holds, and counters since the last row."""

    used_bytes: int = 0
    max_bytes: int = 0
    evictions: int = 0
    get_bytes: int = 0
    put_bytes: int = 0
    up: bool = True

    def joined(self, other: "TierRow") -> "TierRow":
        """Of two ranks that use the same tier."""
        return TierRow(
            max(self.used_bytes, other.used_bytes),
            max(self.max_bytes, other.max_bytes),
            self.evictions + other.evictions,
            self.get_bytes + other.get_bytes,
            self.put_bytes + other.put_bytes,
            self.up and other.up,
        )

    def after(self, earlier: "TierRow") -> "TierRow":
        """This row with the counters of one that came before it."""
        return replace(
            self,
            evictions=self.evictions + earlier.evictions,
            get_bytes=self.get_bytes + earlier.get_bytes,
            put_bytes=self.put_bytes + earlier.put_bytes,
        )


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What ranks finished since the last step. Counters count ranks, so that the scheduler knows when all did."""

    loaded: Counter[str] = field(default_factory=Counter)  # request ids
    written: Counter[int] = field(default_factory=Counter)  # generations whose write to secondary tiers ended
    failed_writes: set[int] = field(default_factory=set)  # those of `written` that no secondary tier took
    broken: set[int] = field(default_factory=set)  # generations whose slots do not hold their object
    absent: set[bytes] = field(default_factory=set)  # hashes that secondary tiers hold broken or not at all
    rows: list[LoadRow] = field(default_factory=list)
    checks: list[CheckRow] = field(default_factory=list)
    overdue: list[tuple[str, str, int, float]] = field(default_factory=list)  # loads given up: request, tier, tokens, s
    forwards: list[tuple[int, float]] = field(default_factory=list)  # prefill tokens and seconds of forward passes
    tiers: dict[str, TierRow] = field(default_factory=dict)  # secondary tiers by name, now and then
    adapters: dict[int, LoadedAdapter] = field(default_factory=dict)  # LoRA adapters loaded since the last report
    events: Counter[str] = field(default_factory=Counter)  # of tier workers
    stale_version: str | None = None  # of the namespace: the model has got other weights under it

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        if isinstance(other, WorkerReport):
            self.loaded.update(other.loaded)
            self.written.update(other.written)
            self.failed_writes |= other.failed_writes
            self.broken |= other.broken
            self.absent |= other.absent
            self.rows += other.rows
            self.checks += other.checks
            self.overdue += other.overdue
            self.forwards += other.forwards
            self.events.update(other.events)
            if other.stale_version is not None:
                self.stale_version = other.stale_version
            for name, row in other.tiers.items():
                self.tiers[name] = row.joined(self.tiers[name]) if name in self.tiers else row
            for adapter_id, loaded in other.adapters.items():
                self.adapters[adapter_id] = loaded.agreed(self.adapters.get(adapter_id, loaded))
        return self
