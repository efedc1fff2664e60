"""`Worker` copies what the scheduler side decided, and reports what finished."""

import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from itertools import takewhile
from typing import Any

from kvlab.connectors.vllm.adapters import ADAPTERS
from kvlab.connectors.vllm.messages import (
    Adapter,
    LoadOp,
    LoadRow,
    RequestLoad,
    SaveOp,
    StepMetadata,
    WorkerReport,
)
from kvlab.connectors.vllm.scheduler.admission import MIN_PREFILL_TOKENS
from kvlab.connectors.vllm.worker.pending import PendingLoad
from kvlab.connectors.vllm.worker.reports import Reports
from kvlab.connectors.vllm.worker.tier_rows import TierRows, log_tiers
from kvlab.connectors.vllm.worker.write_back import MAX_DELAY_S, WriteBackQueue
from kvlab.engine import CacheEngine
from kvlab.hashing import versioned
from kvlab.paged.slots import room
from kvlab.paged.transfer import Clock, Transfer
from kvlab.stores.closing import close_store
from kvlab.threads import Threads

logger = logging.getLogger("vllm.kvlab")
TIMED_STEPS = 8  # one in so many of the steps without a prefill is timed
PAGE_AXES = ("blocks", "layers", "page_bytes")
LOAD_TIMEOUT_S = 30.0
STALL_S = 30.0  # at the end, a write that takes longer is left alone
LOAD_STALL_S = 5.0  # and a load, which is lost anyway
FETCH_THREADS = 4  # objects of one load are read at once, so that disk, network and checks overlap


class Worker:
    """Executes a step's copies. `engine` holds the secondary tiers, or is None; `writes_early`: the engine may write to
    new pages before `begin`; `max_write_delay_s`: see `WriteBackQueue`; `load_timeout_s`: after so long a load between
    steps is given up.

    Each slot remembers the generation whose bytes it holds. It must be the one that a copy names, before the bytes are
    read and after. A load from a slot of another generation is reported as lost, and the engine computes; a write of
    it is not made. The scheduler side gives no slot to another object while a copy may touch it. This check is the
    second line of defence: no request sees another's KV, and no tier gets it under a wrong name.
    """

    def __init__(
        self,
        transfer: Transfer,
        num_slots: int,
        engine: CacheEngine | None,
        *,
        writes_early: bool = False,
        max_write_delay_s: float = MAX_DELAY_S,
        load_timeout_s: float = LOAD_TIMEOUT_S,
    ) -> None:
        self.transfer = transfer
        self.engine = engine
        self._writes_early = writes_early
        self.counters: Counter[str] = Counter()
        self._owner: list[int | None] = [None] * num_slots  # generations
        self._reports = Reports()
        self._saves = True
        self._version = ""  # of the namespace
        self._lost_blocks: set[int] = set()
        self._finished: set[str] = set()
        self._lost_requests: set[str] = set()
        self._pending: dict[str, PendingLoad] = {}  # loads between steps, by request id
        self._load_timeout_s = load_timeout_s
        self._num_decodes = 0  # steps without a prefill
        self._forward: tuple[int, Clock] | None = None  # prefill tokens of this step's forward pass
        self._lock = threading.Lock()
        self._copies = Threads(2, "kvlab-copy")  # loads from memory, which no tier delays
        self._loads = Threads(2, "kvlab-load")
        self._fetches = Threads(FETCH_THREADS, "kvlab-fetch")
        self.write_back = WriteBackQueue(self._write, max_delay_s=max_write_delay_s)
        self._tier_rows = TierRows(engine.store, self._fetches, self._reports.add_tiers) if engine is not None else None

    # ---- each step

    def begin(self, metadata: StepMetadata) -> None:
        """The step's forward pass comes next."""
        self._version = metadata.version
        if self._pending:
            self._expire_loads()
        self.transfer.before_writes(metadata.new_blocks)
        if metadata.unclean_blocks:
            self._clear(metadata.unclean_blocks)
        prefill = metadata.prefill_tokens
        decodes = metadata.num_tokens > 0 and not prefill
        self._num_decodes += decodes
        if self._tier_rows is not None:
            self.write_back.begin_step(prefill)
            self._tier_rows.begin_step()
        timed = prefill >= MIN_PREFILL_TOKENS or (decodes and self._num_decodes % TIMED_STEPS == 0)
        self._forward = (prefill, self.transfer.clock()) if timed else None

    def _clear(self, block_ids: Sequence[int]) -> None:
        """Zero pages of which objects will hold more than tokens write. Where that fails, nothing is saved any more: a
        page that was not cleared may be saved at any later step."""
        try:
            self.transfer.clear(block_ids)
        except Exception:
            self._saves = False
            raise

    def load_now(self, loads: Iterable[RequestLoad]) -> set[int]:
        """Loads within the step, before `begin`: the engine's next work sees them. Returns the pages they could not
        fill."""
        return {page for load in loads for page in self._load(load)}

    def load(self, metadata: StepMetadata) -> None:
        """Begin loads between steps."""
        for load in metadata.loads:
            pending = self._pending[load.request_id] = PendingLoad(load)
            threads = self._loads if any(op.fetch for op in load.ops) else self._copies
            # The pages may be those of a request that has just ended and whose last step is still under way.
            threads.submit(self._load, load, self.transfer.fence(), pending)
        metadata.loads = []

    def save(self, metadata: StepMetadata) -> None:
        """All of a step's saves as one copy: few large copies are faster than many small ones."""
        if self._forward is not None:
            self._forward[1].stop()
            self._reports.add_forward(*self._forward)
            self._forward = None
        if not metadata.saves:
            return
        ops, metadata.saves = [op for op in metadata.saves if self._may_save(op)], []
        if not ops:
            return
        slots = [slot for op in ops for slot in op.slots]
        blocks = [block for op in ops for block in op.block_ids]
        try:
            for slot in slots:
                self._owner[slot] = None
            self.transfer.save(blocks, slots)
            if self._writes_early:
                self.transfer.before_writes(blocks)
        except Exception:
            for op in ops:
                self._failed("save", op)
                self._unsaved(op)
            return
        for op in ops:
            self._own(op)
            if op.write:
                self.write_back.put(op)

    def _may_save(self, op: SaveOp) -> bool:
        """False if the pages are known not to hold what the object's key says; then it is not saved."""
        if self._saves and not _other_adapter(op.adapter):
            return True
        self._unsaved(op)
        return False

    @property
    def has_finished(self) -> bool:
        """Whether async loads ended since they were last taken."""
        return bool(self._finished)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose async loads ended, and those of them with pages that were not filled."""
        if not self._finished:  # what ends from now on is reported in the next step
            return set(), set()
        with self._lock:
            finished, self._finished = self._finished, set()
            failed, self._lost_requests = self._lost_requests, set()
        return finished, failed

    def take_lost_blocks(self) -> set[int]:
        """Pages that loads between steps could not fill."""
        if not self._lost_blocks:
            return set()
        with self._lock:
            lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def take_report(self) -> WorkerReport | None:
        """What is new since the last call; None if nothing is."""
        return self._reports.take()

    def log_tiers(self) -> None:
        """Log what the secondary tiers hold, in a thread of its own."""
        if self.engine is not None:
            self._fetches.submit(log_tiers, self.engine)

    def close(self) -> None:
        """Finish the writes that are queued; drop loads. A thread whose tier does not answer is left behind, with the
        memory that it may still write to."""
        pools = (self._copies, self._loads, self._fetches)
        ended = [threads.close(cancel=True, stall_s=LOAD_STALL_S) for threads in pools]
        ended.append(self.write_back.close(stall_s=STALL_S))
        if all(ended):
            self.transfer.close()
        else:
            logger.warning("kvlab: a tier does not answer; what was not written to it is lost")
        if self.engine is not None:
            close_store(self.engine.store, stall_s=STALL_S if all(ended) else LOAD_STALL_S)

    # ----

    def _expire_loads(self) -> None:
        """Give up loads that take too long: their requests compute, and their pages are left alone."""
        for pending in list(self._pending.values()):
            load, seconds = pending.load, pending.waited_s()
            if seconds < self._load_timeout_s or not pending.claim("timeout"):
                continue
            self._pending.pop(load.request_id, None)
            with self._lock:
                self._lost_blocks.update(load.pages)
                self._finished.add(load.request_id)
                self._lost_requests.add(load.request_id)
            with self._reports.adding() as report:
                tier = "secondary" if any(op.fetch for op in load.ops) else "memory"
                report.overdue.append((load.request_id, tier, sum(op.num_tokens for op in load.ops), seconds))

    def _load(self, load: RequestLoad, after: Any = None, pending: PendingLoad | None = None) -> list[int]:
        """The pages that could not be filled. `pending`: of a load between steps."""
        start = time.perf_counter()
        pages: list[int] = []
        tiers: dict[str, None] = {}
        tokens = 0
        wanted = [block for op in load.ops for block in op.block_ids]
        clock: Clock | None = None
        try:
            ops = [] if _other_adapter(load.adapter) else load.ops
            served_by = self._fetch_all([op for op in ops if op.fetch], load.version)
            if pending is not None and not pending.claim("load"):
                return self._end_overdue(load)
            held = list(takewhile(self._present, ops))  # KV without its prefix is useless
            slots = [slot for op in held for slot in op.picked]
            pages = [block for op in held for block in op.block_ids]
            if slots and load.is_async:
                self.transfer.load_and_wait(slots, pages, after)
            elif slots:
                clock = self.transfer.load(slots, pages)
            taken = list(takewhile(self._present, held))  # the slots were not given to others meanwhile
            if load.is_async and load.version != self._version:
                taken = []  # the weights may have changed since
            pages = pages[: sum(len(op.block_ids) for op in taken)]
            tokens = sum(op.num_tokens for op in taken)
            tiers = dict.fromkeys(served_by.get(op.generation, "memory") for op in taken if op.picked)
        except Exception:
            pages, tokens = [], 0
            self._failed("load", *load.ops)
            if pending is not None and not pending.claim("load"):
                return self._end_overdue(load)
        num_bytes = len(pages) * self.transfer.layout.block_bytes
        seconds = time.perf_counter() - start
        delay = pending.waited_s() if pending is not None else seconds
        row = LoadRow(load.request_id, tokens, num_bytes, seconds, "+".join(tiers) or "none", delay)
        lost = load.lost_blocks + wanted[len(pages) :]
        if load.is_async:
            self._ended(load)
        with self._lock:
            if load.is_async:
                self._pending.pop(load.request_id, None)
                self._lost_blocks.update(lost)
                self._finished.add(load.request_id)
                if lost:
                    self._lost_requests.add(load.request_id)
        if clock is not None or wanted:
            self._reports.add_load(row, load.prompt_tokens, clock)
        return lost

    def _end_overdue(self, load: RequestLoad) -> list[int]:
        """The request was told that its load failed. The leases of its objects end only here: the thread wrote to
        their slots until now."""
        self._ended(load)
        return load.pages

    def _ended(self, load: RequestLoad) -> None:
        """No thread touches its slots any more."""
        with self._reports.adding() as report:
            report.loaded[load.request_id] += 1

    def _holds(self, op: LoadOp | SaveOp) -> bool:
        """Whether the operation's slots hold its object now."""
        slots = op.picked if isinstance(op, LoadOp) else op.slots
        return all(self._owner[slot] == op.generation for slot in slots)

    def _own(self, op: LoadOp | SaveOp) -> None:
        for slot in op.slots:
            self._owner[slot] = op.generation

    def _present(self, op: LoadOp) -> bool:
        """Whether the slots this load reads hold its object."""
        if self._holds(op):
            return True
        self.counters["slot_mismatch"] += not op.fetch
        self._mark_broken(op)
        return False

    def _fetch_all(self, ops: Sequence[LoadOp], version: str) -> dict[int, str]:
        """Fill objects' slots from the secondary tiers, whose names are returned by generation. When it returns, no
        thread writes to the slots any more."""
        served_by: dict[int, str] = {}
        if len(ops) == 1:
            self._fetch(ops[0], version, served_by)
        else:
            wait([self._fetches.submit(self._fetch, op, version, served_by) for op in ops])
        return served_by

    def _fetch(self, op: LoadOp, version: str, served_by: dict[int, str]) -> None:
        """Fill one object's slots, in place where they lie in one run. Where that fails, they hold no object."""
        for slot in op.slots:
            self._owner[slot] = None
        try:
            if (engine := self._engine_of(version)) is None:
                return
            place = self.transfer.view(op.slots)
            out = place if place is not None else room(self.transfer.arena, len(op.slots))
            tokens = {"first_token": op.first_token, "end_token": op.end_token}
            if engine.load_object(engine.namespace.key(op.hash), out, axes=PAGE_AXES, **tokens) is None:
                self._mark_absent(op)
                return
            served_by[op.generation] = engine.store.served_by
            if place is None:
                self.transfer.fill(op.slots, out)
        except BaseException:  # a store of another package may raise what is no Exception
            self._failed("fetch", op)
            self._mark_absent(op)
            return
        self._own(op)

    def _write(self, op: SaveOp) -> None:
        """Write an object to the secondary tiers. Its slots are leased until this is reported."""
        stored = False
        try:
            if (engine := self._engine_of(op.version)) is not None and self._holds(op):
                stored = engine.contains_many([op.hash])[0] or engine.save_object(
                    engine.namespace.key(op.hash),
                    self.transfer.slots(op.slots),
                    PAGE_AXES,
                    first_token=op.first_token,
                    end_token=op.end_token,
                    confirm=lambda: self._holds(op),
                )
        except BaseException:  # as above; the lease must end
            self._failed("write", op)
        self._end_write(op, success=stored)

    def _engine_of(self, version: str) -> CacheEngine | None:
        """The secondary tiers under this version of the namespace."""
        if self.engine is None or not version:
            return self.engine
        engine = copy.copy(self.engine)
        engine.namespace = versioned(self.engine.namespace, version)
        return engine

    def _end_write(self, op: SaveOp, *, success: bool) -> None:
        with self._reports.adding() as report:
            report.written[op.generation] += 1
            if not success:
                report.failed_writes.add(op.generation)

    def _mark_broken(self, *ops: LoadOp | SaveOp) -> None:
        """These objects' slots do not hold them."""
        with self._reports.adding() as report:
            report.broken.update(op.generation for op in ops)

    def _mark_absent(self, op: LoadOp) -> None:
        """The secondary tiers do not hold this object, or hold it broken."""
        self._mark_broken(op)
        with self._reports.adding() as report:
            report.absent.add(op.hash)

    def _unsaved(self, op: SaveOp) -> None:
        """An object whose slots were not filled."""
        self._mark_broken(op)
        if op.write:
            self._end_write(op, success=False)

    def _failed(self, what: str, *ops: LoadOp | SaveOp) -> None:
        """An error costs a miss, never the engine: counts it, and logs it with its traceback the first time."""
        self.counters[f"{what}_errors"] += 1
        if self.counters[f"{what}_errors"] == 1:
            logger.exception("kvlab: %s of object %s failed", what, ops[0].hash.hex())
        if what != "write":
            self._mark_broken(*ops)


def _other_adapter(adapter: Adapter | None) -> bool:
    """Whether other weights than those of the name lie under the adapter's id now."""
    return adapter is not None and ADAPTERS.num_loads(adapter.adapter_id) != adapter.num_loads
