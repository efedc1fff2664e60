"""`Worker` copies what the scheduler side decided, and reports what finished."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

from kvlab.connectors.vllm import states
from kvlab.connectors.vllm.messages import LoadOp, RequestLoad, SaveOp, StepMetadata, WorkerReport
from kvlab.connectors.vllm.worker.checks import QualityChecks
from kvlab.connectors.vllm.worker.lent import Lent
from kvlab.connectors.vllm.worker.model_weights import ModelWeights
from kvlab.connectors.vllm.worker.pending import PendingLoad, load_row, page_tokens
from kvlab.connectors.vllm.worker.reports import Reports
from kvlab.connectors.vllm.worker.saved import Saved
from kvlab.connectors.vllm.worker.tier_rows import TierRows
from kvlab.connectors.vllm.worker.timed import TimedSteps
from kvlab.paged.transfer import Clock, Transfer
from kvlab.sharedmemory import SharedSlots
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.link import Message
from kvlab.tierworker.messages import Fill, Write, runs_of

logger = logging.getLogger("vllm.kvlab")
POLLED_STEPS = 16  # in one of so many steps that wait for nothing, the tier worker is heard all the same
LOAD_TIMEOUT_S = 30.0


class Worker:
    """Executes a step's copies. `tiers` leads to the secondary tiers and `shared` is the arena that their process maps;
    both are None where there are none. `writes_early`: the engine may write to new pages before `begin`;
    `load_timeout_s`: after so long a load between steps is given up; `borrows`: what lies in a cache server's memory is
    copied to pages from there.

    Each slot remembers the generation whose bytes it holds. It must be the one that a copy names, before the bytes are
    read and after. A load from a slot of another generation is reported as lost, and the engine computes; a write of
    it is not made. The scheduler side gives no slot to another object while a copy may touch it. This check is the
    second line of defence: no request sees another's KV, and no tier gets it under a wrong name.

    All of it runs in the engine's own thread: copies are queued, and what ends is noticed in `poll`.
    """

    def __init__(
        self,
        transfer: Transfer,
        num_slots: int,
        tiers: TierClient | None,
        shared: SharedSlots | None = None,
        *,
        writes_early: bool = False,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        padding: states.Padding | None = None,
        borrows: bool = False,
        checks: QualityChecks | None = None,
    ) -> None:
        self.transfer, self._checks = transfer, checks
        self._lent = Lent(tiers, transfer, is_wanted=borrows)
        self._saved = Saved(transfer)
        self._padding = padding
        self.tiers, self._shared = tiers, shared
        self._writes_early = writes_early
        self.counters: Counter[str] = Counter()
        self._owner: list[int | None] = [None] * num_slots  # generations
        self._reports = Reports()
        self._saves = True
        self._num_saves = 0  # copies from pages to slots
        self._version = ""  # of the namespace
        self._weights = ModelWeights()
        self._lost_blocks: set[int] = set()
        self._finished: set[str] = set()
        self._lost_requests: set[str] = set()
        self._pending: list[PendingLoad] = []
        self._load_timeout_s = load_timeout_s
        self._num_steps = 0
        self._timed = TimedSteps(transfer)
        self._tier_rows = TierRows()

    # ---- each step

    def begin(self, metadata: StepMetadata) -> None:
        """The step's forward pass comes next."""
        self._version = metadata.version
        self._weights.begin(metadata.version, metadata.num_tokens)
        if self._weights.are_other:
            self._reports.current.stale_version = metadata.version
        self._num_steps += 1
        self.transfer.before_writes(metadata.new_blocks)
        if metadata.unclean_blocks or metadata.state_pages:
            self._clear(metadata)
        if self._saved:
            self.take_saved()
        if self._pending or self.tiers is not None:
            self.poll(always=self._num_steps % POLLED_STEPS == 0)
        self._timed.begin(metadata)

    def poll(self, *, always: bool = True) -> None:
        """Take what the tier worker has answered, and go on with loads between steps. Unless `always`, only if
        something is waited for."""
        if self.tiers is not None and (always or self.tiers.has_waiting):
            self.tiers.poll()
            if self.tiers.rows is not None:
                rows, self.tiers.rows = self.tiers.rows, None
                self._reports.add_tiers(self._tier_rows.increments(rows))
            if self.tiers.counters:
                self._reports.current.events.update(self.tiers.counters)
                self.tiers.counters.clear()
        for pending in list(self._pending):
            self._advance(pending)

    def _clear(self, metadata: StepMetadata) -> None:
        """Zero what objects will hold of pages and the step does not write. Where that fails, nothing is saved any
        more: a page that was not cleared may be saved at any later step."""
        try:
            if metadata.unclean_blocks:
                self.transfer.clear(metadata.unclean_blocks)
            if self._padding is not None:
                self._padding.clear(metadata.state_pages)
        except Exception:
            self._saves = False
            raise

    def load_now(self, loads: Iterable[RequestLoad]) -> set[int]:
        """Loads within the step, before `begin`: the engine's next work sees them. Returns the pages they could not
        fill."""
        return {page for load in loads for page in self._load_now(load)}

    def load(self, metadata: StepMetadata) -> None:
        """Begin loads between steps."""
        for load in metadata.loads:
            is_stale = self._weights.are_other_than(load.adapter)
            pending = PendingLoad(load, [] if is_stale else load.ops, self.transfer.fence())
            self._pending.append(pending)
            self._disown([slot for op in pending.unsent for slot in op.slots])
            self._advance(pending)
        metadata.loads = []

    def save(self, metadata: StepMetadata) -> None:
        """All of a step's saves as one copy: few large copies are faster than many small ones."""
        self._timed.end(self._reports)
        if self._checks is not None and not self._saved:  # else it is not known whether slots hold their blocks
            self._checks.step(metadata.checks, self._owner, self._weights, self._reports)
        ops, metadata.saves = [op for op in metadata.saves if self._may_save(op)], []
        if not ops:
            return
        slots = [slot for op in ops for slot in op.slots]
        blocks = [block for op in ops for block in op.block_ids]
        try:
            self._disown(slots)
            self.transfer.save(blocks, slots, **page_tokens(self.transfer.coded_tokens, ops))
            if self._writes_early:
                self.transfer.before_writes(blocks)
            self._num_saves += 1
            self.transfer.mark_saved(self._num_saves)
        except Exception:
            for op in ops:
                self._failed("save", op)
                self._unsaved(op)
            return
        for op in ops:
            self._own(op)
        self._saved.add(ops)
        self.take_saved()

    def take_saved(self, wait_for: Sequence[int] | None = ()) -> None:
        """Have objects written whose slots are known to hold them, and drop those that a codec cannot keep. Waits for
        saves to these slots; None: for all."""
        unfit, whole, broken = self._saved.known(wait_for)
        if unfit:
            self._disown(sorted(unfit))
        for op in broken:
            self._unsaved(op)
        for op in whole:
            if op.write:
                self._write(op)

    def _held(self, ops: Sequence[LoadOp]) -> list[LoadOp]:
        """The first of `ops` whose slots hold their objects."""
        if self._saved:
            self.take_saved([slot for op in ops for slot in op.picked])
        return list(takewhile(self._present, ops))

    def _may_save(self, op: SaveOp) -> bool:
        """False if the pages are known not to hold what the object's key says; then it is not saved."""
        if self._saves and not self._weights.are_other_than(op.adapter):
            return True
        self._unsaved(op)
        return False

    @property
    def has_finished(self) -> bool:
        """Whether async loads ended since they were last taken."""
        if self._pending:
            self.poll()
        return bool(self._finished)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose async loads ended, and those of them with pages that were not filled."""
        if not self.has_finished:  # what ends from now on is reported in the next step
            return set(), set()
        finished, self._finished = self._finished, set()
        failed, self._lost_requests = self._lost_requests, set()
        return finished, failed

    def take_lost_blocks(self) -> set[int]:
        """Pages that loads between steps could not fill."""
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def take_report(self) -> WorkerReport | None:
        """What is new since the last call; None if nothing is."""
        return self._reports.take()

    def close(self) -> None:
        """Have what was saved written to the tiers; drop loads. Where the tier worker does not die, the arena stays."""
        self.take_saved(None)
        if self.tiers is None or self.tiers.close():
            self.transfer.close()
        else:
            logger.warning("kvlab: the tier worker does not end; its memory is left to it")
        if self._shared is not None:
            self._shared.close()

    # ---- loads between steps

    def _advance(self, pending: PendingLoad) -> None:
        """Ask for objects, copy those that have come, and end the load if nothing is left to do."""
        self._ask_for_objects(pending)
        if ready := pending.take_ready():
            held = self._held(ready)
            if len(held) < len(ready):
                pending.stop_before(ready[len(held)])
            self._copy(pending, held)
        if pending.is_given_up:
            self._end_overdue(pending)
        elif pending.has_ended:
            self._end(pending)
        elif pending.waited_s() >= self._load_timeout_s and not pending.is_copying():
            self._give_up(pending)

    def _ask_for_objects(self, pending: PendingLoad) -> None:
        """Of objects whose slots no copy uses any more: the tier worker writes to them from now on."""
        if self.tiers is None or pending.is_given_up:
            return
        while pending.unsent and self.transfer.is_settled(pending.unsent[0].slots):
            op = pending.unsent.pop(0)
            pending.num_awaited += 1
            place = (0, pending.load.version, op.hash.hex(), runs_of(op.slots), op.first_token, op.end_token)
            fill = Fill(self.tiers.next_id(), *place, lend=self._lent.may_ask)

            def answered(message: Message | None, _: bytes, op: LoadOp = op, fill: Fill = fill) -> None:
                tier = self.tiers.name_of(str(message.get("tier", ""))) if message and self.tiers else ""
                if not tier or (message and "at" in message and not self._lent.take(op, fill, message["at"])):
                    tier = ""
                    self._mark_absent(op)
                elif op not in self._lent:
                    self._own(op)
                pending.answered(op, tier)

            self.tiers.fill(fill, answered)

    def _copy(self, pending: PendingLoad, ops: Sequence[LoadOp]) -> None:
        try:
            for clock in self._lent.copies(ops, pending.fence):
                pending.copies(clock)
        except Exception:
            self._failed("load", *ops)
            pending.stop_before(ops[0])

    def _give_up(self, pending: PendingLoad) -> None:
        """The load takes too long: its request computes, and its pages are left alone."""
        load = pending.load
        pending.is_given_up = True
        self._lost_blocks.update(load.pages)
        self._finished.add(load.request_id)
        self._lost_requests.add(load.request_id)
        tier = "secondary" if any(op.fetch for op in load.ops) else "memory"
        self._reports.current.overdue.append((load.request_id, tier, load.num_tokens, pending.waited_s()))
        self._end_overdue(pending)

    def _end_overdue(self, pending: PendingLoad) -> None:
        """The request was told that its load failed. The leases of its objects end only once nothing writes to their
        slots."""
        if not pending.touches_slots:
            self._pending.remove(pending)
            self._lent.give_back(pending.ops)
            self._mark_broken(*pending.unfilled)
            self._reports.current.loaded[pending.load.request_id] += 1

    def _end(self, pending: PendingLoad) -> None:
        load = pending.load
        self._pending.remove(pending)
        self._mark_broken(*pending.unfilled)
        taken = list(takewhile(self._present, pending.copied))  # the slots were not given to others meanwhile
        self._lent.give_back(pending.ops)
        if load.version != self._version or self._weights.are_other:
            taken = []
        wanted = [block for op in load.ops for block in op.block_ids]
        lost = load.lost_blocks + wanted[sum(len(op.block_ids) for op in taken) :]
        self._lost_blocks.update(lost)
        self._finished.add(load.request_id)
        if lost:
            self._lost_requests.add(load.request_id)
        self._reports.current.loaded[load.request_id] += 1
        if wanted:
            seconds = pending.waited_s()
            row = load_row(load, taken, pending.served_by, seconds, self.transfer.layout.block_bytes)
            self._reports.add_load(row, load.prompt_tokens)

    # ---- loads within a step

    def _load_now(self, load: RequestLoad) -> list[int]:
        """The pages that could not be filled."""
        start = time.perf_counter()
        taken: list[LoadOp] = []
        wanted = [block for op in load.ops for block in op.block_ids]
        clock: Clock | None = None
        try:
            held = self._held([] if self._weights.are_other_than(load.adapter) else load.ops)
            slots = [slot for op in held for slot in op.picked]
            if slots:
                pages = [block for op in held for block in op.block_ids]
                clock = self.transfer.load(slots, pages, **page_tokens(self.transfer.coded_tokens, held))
            taken = list(takewhile(self._present, held))
        except Exception:
            taken = []
            self._failed("load", *load.ops)
        row = load_row(load, taken, {}, time.perf_counter() - start, self.transfer.layout.block_bytes)
        if clock is not None or wanted:
            self._reports.add_load(row, load.prompt_tokens, clock)
        return load.lost_blocks + wanted[sum(len(op.block_ids) for op in taken) :]

    # ---- slots

    def _own(self, op: LoadOp | SaveOp) -> None:
        for slot in op.slots:
            self._owner[slot] = op.generation
        if self._shared is not None:
            self._shared.owners[list(op.slots)] = op.generation

    def _disown(self, slots: Sequence[int]) -> None:
        """They hold no object, from before the first byte changes."""
        for slot in slots:
            self._owner[slot] = None
        if self._shared is not None:
            self._shared.owners[list(slots)] = 0

    def _present(self, op: LoadOp) -> bool:
        """Whether the slots this load reads hold its object, or what is lent is still there."""
        if (is_lent := op in self._lent) and not self._lent.has_kept(op):
            self._mark_absent(op)  # so that it is not asked for again and again
            return False
        if is_lent or all(self._owner[slot] == op.generation for slot in op.picked):
            return True
        self.counters["slot_mismatch"] += not op.fetch
        self._mark_broken(op)
        return False

    # ---- writes, and what went wrong

    def _write(self, op: SaveOp) -> None:
        """Have an object written to the secondary tiers. Its slots are leased until this is reported."""
        if self.tiers is None:
            self._end_write(op, success=False)
            return
        place = (0, op.version, op.hash.hex(), runs_of(op.slots), op.first_token, op.end_token)
        write = Write(self.tiers.next_id(), *place, generation=op.generation, after=self._num_saves)

        def answered(message: Message | None, _: bytes) -> None:
            self._end_write(op, success=message is not None and message.get("ok") is True)

        self.tiers.write(write, answered)

    def _end_write(self, op: SaveOp, *, success: bool) -> None:
        self._reports.current.written[op.generation] += 1
        if not success:
            self._reports.current.failed_writes.add(op.generation)

    def _mark_broken(self, *ops: LoadOp | SaveOp) -> None:
        """These objects' slots do not hold them."""
        if ops:
            self._reports.current.broken.update(op.generation for op in ops)

    def _mark_absent(self, op: LoadOp) -> None:
        """The secondary tiers do not hold this object, or hold it broken."""
        self._mark_broken(op)
        self._reports.current.absent.add(op.hash)

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
        self._mark_broken(*ops)
