"""What scheduler and workers tell each other, once per engine step. All of it pickles: they may be two processes."""

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass
class LoadOp:
    """Copy blocks of one object, which serve `num_tokens` of the request, into pages: the slots `picked` into the pages
    `block_ids`. `slots` are the whole object's; with `fetch`, a worker fills them from the lower tiers first.
    """

    hash: bytes
    slots: tuple[int, ...]
    picked: tuple[int, ...]
    block_ids: tuple[int, ...]
    num_tokens: int
    fetch: bool = False


@dataclass
class RequestLoad:
    """All loads of one request. `is_async`: between steps, reported when done; else while the step is planned.
    `lost_blocks` are pages that were promised and cannot be filled: the engine must compute them."""

    request_id: str
    ops: list[LoadOp]
    prompt_tokens: int
    is_async: bool
    lost_blocks: list[int] = field(default_factory=list)


@dataclass
class SaveOp:
    """Copy the pages `block_ids` into `slots`; with `write`, also hand the object on to the lower tiers."""

    hash: bytes
    slots: tuple[int, ...]
    block_ids: tuple[int, ...]
    num_tokens: int  # tokens of the prefix that ends with this object
    write: bool


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's copies but for loads within it. `num_tokens` are those the step computes, `prefill_tokens` those of
    them that belong to prompts; `new_blocks` are the pages that requests have been given for it."""

    loads: list[RequestLoad] = field(default_factory=list)
    saves: list[SaveOp] = field(default_factory=list)
    num_tokens: int = 0
    prefill_tokens: int = 0
    new_blocks: list[int] = field(default_factory=list)


@dataclass
class LoadRow:
    """One request's load as measured by a worker: `seconds` from the beginning to the end of the copy, `delay` those by
    which it held up the engine, which may still have been computing when the copy began; or, between steps, the
    request, which may have waited for others' loads."""

    request_id: str
    num_tokens: int
    num_bytes: int
    seconds: float
    tier: str
    delay: float


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What ranks finished since the last step. Counters count ranks, so that the scheduler knows when all did."""

    loaded: Counter[str] = field(default_factory=Counter)  # request ids
    settled: Counter[bytes] = field(default_factory=Counter)  # hashes whose hand-over to lower tiers ended
    refused: set[bytes] = field(default_factory=set)  # those of `settled` that no lower tier took
    bad: set[bytes] = field(default_factory=set)  # hashes that must not be served again
    rows: list[LoadRow] = field(default_factory=list)
    forwards: list[tuple[int, float]] = field(default_factory=list)  # prefill tokens and seconds of forward passes

    def __bool__(self) -> bool:
        return bool(self.loaded or self.settled or self.bad or self.rows or self.forwards)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        if isinstance(other, WorkerReport):
            self.loaded.update(other.loaded)
            self.settled.update(other.settled)
            self.refused |= other.refused
            self.bad |= other.bad
            self.rows += other.rows
            self.forwards += other.forwards
        return self
