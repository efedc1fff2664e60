"""`TierServer` carries out what one engine asks: in the worker's process, with threads of its own."""

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kvlab.auth import auth_key
from kvlab.errors import ConfigError, KVLabError, StoreError
from kvlab.hashing import HASH_BYTES, Namespace
from kvlab.objects import OF_A_PEER
from kvlab.page_objects import PageObjects
from kvlab.stated import is_chunked
from kvlab.stores import Store, open_stores
from kvlab.stores.closing import close_store
from kvlab.stores.sealed import MOST_BYTES
from kvlab.system import num_cores
from kvlab.threads import Threads
from kvlab.tierworker.budget import Hold, Limits, Taken
from kvlab.tierworker.link import Link, LinkError, Message
from kvlab.tierworker.loans import Lender, Loans
from kvlab.tierworker.messages import Ask, Fill, Memory, Opening, Place, Write, ask_of, failure, place_of, text_of
from kvlab.tierworker.questions import UnwantedError, answer
from kvlab.tierworker.rows import log_tiers, shown
from kvlab.tierworker.slots import MappedSlots
from kvlab.units import format_bytes

logger = logging.getLogger("kvlab.tiers")
# Objects that are read, checked or waited for at once: the engine's own threads need cores too.
READ_THREADS = min(max(num_cores() // 2, 4), 16)
WRITE_THREADS = 2
ASK_THREADS = 2
ROWS_INTERVAL_S = 10.0
LOOK_S = 0.2  # between looks at whether the engine lives and what is to be told
OPENING_S = 10.0  # for an engine that attaches to say what it wants
ROOM_WAIT_S = 60.0  # for memory that other objects take
LEFT_COPY_S = 1.0  # for an engine's copy, once the server stops
DRAIN_S, DRAIN_STALL_S = 20.0, 5.0  # for writes, once the server stops: in all, and without that one ends
STALL_S = 30.0  # at the end, a write that takes longer is left alone
READ_STALL_S = 5.0  # and a read, which is lost anyway
ABANDON_S = 0.5  # what is under way when the engine is gone
MAX_UNDER_WAY = 20_000  # requests; more are left in the socket
MAX_QUESTION_BYTES = 32 << 20
MAX_UNHEARD_BYTES = 32 << 20  # of answers that the engine does not take
ELEMENT_BYTES = 24  # of the tables for an element of a page


class TierServer:
    """Serves the engine at the other end of `link` until it closes or is gone: `run`. `parent`: the process that must
    live. `store`: shared with other engines, in place of one that the engine's tiers name; then the session has a
    `token`, `is_over` says of another token whether its session has let go of its engine's memory, `limits` are those
    of all sessions, and `lender` has the memory that engines may map."""

    def __init__(
        self,
        link: Link,
        *,
        store: Store | None = None,
        parent: int = 0,
        token: str = "",
        is_over: Callable[[str], bool] | None = None,
        limits: Limits | None = None,
        lender: Lender | None = None,
    ) -> None:
        self.link = link
        self.objects: PageObjects | None = None
        self._given = store
        self._parent = parent
        self._token = token
        self._is_over = is_over
        self._limits = limits
        self._loans = None if lender is None or lender.fd < 0 else Loans(lender)
        self._taken = None if limits is None else Taken(limits)
        self._born = time.monotonic()
        self._is_left = self._has_ended = self._is_abandoned = False
        self._left_at = 0.0
        self._is_coded = True  # what tiers hold is not what slots hold
        self.num_dropped = 0  # writes that were not done when the server stopped
        self._num_writes = 0
        self._namespaces: list[Namespace] = []
        self._slots: MappedSlots | None = None
        self._reads = Threads(READ_THREADS, "kvlab-read")
        self._writes = Threads(WRITE_THREADS, "kvlab-write")
        self._asks = Threads(ASK_THREADS, "kvlab-ask")
        self._num_asked = 0
        self._question_bytes = 0  # under way
        self._lock = threading.Lock()
        self._told_rows: list[dict[str, Any]] = []
        self._next_rows_s = 0.0
        self._are_rows_asked = False

    # ---- the loop

    def run(self) -> None:
        """Returns once all has ended: after what was saved is written, if the engine asked to close; within a second,
        if it is gone; after what is queued is written, as far as there is time, if it is to `leave`."""
        is_asked = False
        try:
            while not is_asked and not self._is_left:
                self._wait()
                is_asked = any(self._take(message, data) for message, data in self.link.receive())
                self._tell_rows()
        except LinkError as error:
            logger.info("kvlab: the engine is gone: %s", error)
        except Exception:
            logger.exception("kvlab: the tier worker ends")
        if self._is_left and not is_asked:
            self._write_what_is_queued()
        self._end(drain=is_asked)

    def _wait(self) -> None:
        """Until something comes, can be sent that could not, or is due."""
        poller = select.poll()
        is_full = self._num_asked - self._num_done > MAX_UNDER_WAY or self._question_bytes > MAX_QUESTION_BYTES
        events = 0 if is_full else select.POLLIN  # it may ask again later
        poller.register(self.link.socket, events | (select.POLLOUT if self.link.queued_bytes else 0))
        poller.poll(LOOK_S * 1e3)
        if self.link.queued_bytes:
            self.link.flush()
        if self.link.queued_bytes > MAX_UNHEARD_BYTES:
            raise LinkError("it takes no answers")
        if self._token and self.objects is None and time.monotonic() > self._born + OPENING_S:
            raise LinkError(f"it has not said what it wants within {OPENING_S:g} s")
        if self._loans is not None and self._loans.are_overdue:
            raise LinkError("it does not give back what it was lent")
        if self._parent and os.getppid() != self._parent:
            raise LinkError("its process has ended")

    @property
    def _num_done(self) -> int:
        return sum(pool.num_done for pool in (self._reads, self._writes, self._asks))

    @property
    def num_queued(self) -> int:
        """Writes that are not done."""
        return self._num_writes - self._writes.num_done

    @property
    def touches_memory(self) -> bool:
        """Whether a thread may still read or write the engine's slots."""
        return any(thread.is_alive() for pool in (self._reads, self._writes) for thread in pool._threads)

    @property
    def is_silent(self) -> bool:
        """Whether it has not said yet what it wants, and may."""
        return self.objects is None and not self._is_left

    def leave(self) -> None:
        """Take nothing more, write what is queued, and end."""
        self._left_at = time.monotonic()
        self._is_left = True

    def _write_what_is_queued(self) -> None:
        """What lies in the socket too, as long as writes end, and no longer than `DRAIN_S`; counts what is not done
        then."""
        since, done = time.monotonic(), self._writes.num_done
        with suppress(LinkError):  # an engine that is gone wants none of them
            while sent := self.link.receive():  # before it heard of the stop
                for message, data in sent:
                    if message.get("op") == "write":
                        self._take(message, data)
            while self.num_queued:
                self.link.flush()
                if self._writes.num_done != done:
                    since, done = time.monotonic(), self._writes.num_done
                if time.monotonic() > min(since + DRAIN_STALL_S, self._left_at + DRAIN_S):
                    break
                time.sleep(0.01)
        self.num_dropped = self.num_queued

    def _take(self, message: Message, data: bytes) -> bool:
        """Begin what a message asks for. Whether it asks to close."""
        op = message.get("op")
        self._num_asked += op in ("fill", "write", "ask")
        if op == "over" and self._is_over is not None:
            self._tell({"op": "over", "is_over": self._is_over(text_of(message, "token"))})
        elif op == "opening" and self.objects is None:
            self._open(Opening.of(message))
        elif self.objects is None:
            raise LinkError("the tiers are not open")
        elif op == "memory" and self._slots is None:
            self._map(Memory.of(message), self.link.take_fd())
        elif op in ("fill", "write"):
            if self._slots is None:
                raise LinkError("a message names slots before there are any")
            place = place_of(message, num_slots=len(self._slots), num_ranks=len(self._namespaces))
            if place.num_slots * self._slots.slot_bytes > MOST_BYTES:
                raise LinkError(f"an object of {place.num_slots} slots is larger than any")
            if isinstance(place, Fill):
                self._reads.submit(self._fill, place)
            else:
                self._num_writes += 1
                self._writes.submit(self._write, place)
        elif op == "ask":
            question = ask_of(message, data)
            with self._lock:
                self._question_bytes += len(data)
            self._asks.submit(self._ask, *question)
        elif op == "give_back" and self._loans is not None:
            self._loans.hear(message)
        elif op == "close":
            return True
        else:
            raise LinkError("a message asks for nothing that there is")
        return False

    def _end(self, *, drain: bool) -> None:
        self._has_ended, self._is_abandoned = True, not drain
        stall_s = READ_STALL_S if drain else ABANDON_S
        self._reads.close(cancel=True, stall_s=stall_s if drain else 0.0)
        self._asks.close(cancel=True, stall_s=0.0)
        written = self._writes.close(cancel=not drain, stall_s=STALL_S if drain else ABANDON_S)
        if not written and drain:
            logger.warning("kvlab: a tier does not answer; what was not written to it is lost")
        if self.objects is not None and not self._token:
            close_store(self.objects.store, stall_s=STALL_S if written and drain else ABANDON_S)
        if drain:
            self._tell({"op": "closed"})
        self.link.close()
        if self._loans is not None:
            self._loans.close()

    # ---- what is asked

    def _open(self, opening: Opening) -> None:
        try:
            if self._token and opening.tiers:
                raise ConfigError("an attached engine brings no tiers of its own; name the socket alone")
            if self._token and is_chunked(opening.serde):  # whose tables are a file of the engine's choice
                raise ConfigError(f"a cache server codes no chunks as {opening.serde[:80]!r}; use int4 or lossless")
            store = self._given if self._given is not None else open_stores(opening.tiers)
            named = [Namespace(str(each["model"]), dict(each["fields"])) for each in opening.namespaces]
            auth = auth_key(opening.auth)
            self._namespaces = named
            self._is_coded = opening.serde != opening.slots
            kinds = {"serde": opening.serde, "slots": opening.slots}
            misfits = OF_A_PEER if self._token else frozenset()  # a session may ask for what no object is
            self.objects = PageObjects(store, namespace=named[0], **kinds, auth=auth, misfits=misfits)
        except (KVLabError, ImportError, OSError, ValueError, TypeError, LookupError) as error:
            self._tell(failure(error))
            raise LinkError("the tiers could not be opened") from error
        lends, fd = (0, -1) if self._loans is None else (self._loans.num_bytes, self._loans.fd)
        self._tell({"op": "ready", "token": self._token, "lends": lends}, fd=fd)
        self._asks.submit(log_tiers, store, named[0].key(b""))

    def _map(self, memory: Memory, fd: int) -> None:
        """What is refused is told: the engine's log says why its tiers are lost."""
        assert self.objects is not None
        try:
            if self._taken is not None:
                num_bytes = memory.num_slots * memory.layers * memory.page_bytes
                self._taken.take("mapped", num_bytes, "slots")
                self._taken.take("maps", memory.num_elements * ELEMENT_BYTES, "tables of pages")
            self.objects.know_pages(memory.page_map, memory.layers)
            self._slots = MappedSlots(memory, fd)
        except (KVLabError, MemoryError) as error:
            self._tell(failure(error))
            raise LinkError(str(error)) from error
        finally:
            os.close(fd)  # the mapping stays

    def give_back(self) -> None:
        """What it had of the limits, once its threads have ended."""
        if self._taken is not None:
            self._taken.give_back()

    def _under(self, rank: int, version: str) -> PageObjects:
        assert self.objects is not None
        return self.objects.under(self._namespaces[rank], version)

    def _fill(self, fill: Fill) -> None:
        assert self._slots is not None
        tier = ""
        try:
            objects = self._under(fill.rank, fill.version)
            if fill.lend and self._loans is not None:
                at = self._loans.lend(fill, objects, self._slots.shape(fill.runs))
                if at is not None:
                    self._tell({"op": "filled", "id": fill.id, "tier": self._loans.name, "at": at})
                    return
            with self._room_for(fill):
                place = self._slots.in_one_run(fill.runs)
                out = place if place is not None else self._slots.room(fill.num_slots)
                key = objects.namespace.key(bytes.fromhex(fill.hash))
                if objects.load(key, out, first_token=fill.first_token, end_token=fill.end_token):
                    tier = objects.store.served_by
                    if place is None:
                        self._slots.scatter(fill.runs, out)
        except BaseException as error:  # a store of another package may raise what is no Exception
            self._failed("fill", fill.hash, error)
            tier = ""
        self._tell({"op": "filled", "id": fill.id, "tier": tier})

    def _write(self, write: Write) -> None:
        assert self._slots is not None
        slots, is_stored = self._slots, False
        try:
            if slots.has_copied(write.after, self._gives_copies_up) and slots.holds(write):
                objects = self._under(write.rank, write.version)
                name = bytes.fromhex(write.hash)
                key = objects.namespace.key(name)
                is_stored = not objects.is_misfit(key) and objects.contains_many([name])[0]
                if not is_stored:
                    with self._room_for(write):
                        is_stored = objects.save(
                            key,
                            slots.content(write.runs),
                            first_token=write.first_token,
                            end_token=write.end_token,
                            confirm=lambda: slots.holds(write),
                        )
                    if is_stored and self._loans is not None:
                        self._loans.check(write, objects, slots.shape(write.runs))
        except BaseException as error:  # as above
            self._failed("write", write.hash, error)
        self._tell({"op": "written", "id": write.id, "ok": is_stored})

    def _gives_copies_up(self) -> bool:
        """A copy that is under way takes milliseconds; the engine may be hung, and the server is to end."""
        return self._is_abandoned or (self._is_left and time.monotonic() > self._left_at + LEFT_COPY_S)

    @contextmanager
    def _room_for(self, place: Place) -> Iterator[None]:
        """While an object takes memory beside its slots: of what all sessions may take. StoreError where it is more, or
        the object is larger than the tiers."""
        assert self._slots is not None
        if self._limits is None:
            yield
            return
        hold, num_bytes = Hold(self._limits.on_the_way), place.num_slots * self._slots.slot_bytes
        most = hold.budget.max_bytes
        is_in_place = len(place.runs) == 1 and not self._is_coded
        try:
            if num_bytes > most or not (
                is_in_place or hold.take(num_bytes, ROOM_WAIT_S, gives_up=lambda: self._is_abandoned)
            ):
                size, limit = format_bytes(num_bytes), format_bytes(most)
                raise StoreError(f"no room for {size} on the way: all engines have {limit}", reason="no_room")
            yield
        finally:
            hold.give_back()

    def _ask(self, ask: Ask, hashes: Sequence[bytes], last: bytes | None, in_memory: bytes) -> None:
        assert self.objects is not None
        try:
            told, data = answer(
                ask,
                hashes,
                last,
                in_memory,
                store=self.objects.store,
                namespaces=self._namespaces,
                is_unfit=self.objects.is_misfit,
                is_wanted=lambda: not self._has_ended,
            )
            self._tell(told, data)
        except UnwantedError:
            logger.debug("kvlab: a question is left alone, its engine is gone")
        finally:
            with self._lock:
                self._question_bytes -= (ask.num_hashes + ask.has_last) * HASH_BYTES + ask.num_hashes

    # ---- what is told

    def _tell(self, message: Message, data: bytes = b"", *, fd: int = -1) -> None:
        try:
            self.link.send(message, data, fd=fd)
        except LinkError:
            logger.debug("kvlab: the engine hears no more")

    def _failed(self, what: str, name: str, error: BaseException) -> None:
        unforeseen = None if isinstance(error, KVLabError) else error
        logger.warning("kvlab: %s of object %s failed: %s", what, name, error, exc_info=unforeseen)

    def _tell_rows(self) -> None:
        """What the tiers hold and did, now and then, if it is news."""
        if self.objects is None or self._are_rows_asked or (now := time.monotonic()) < self._next_rows_s:
            return
        self._are_rows_asked, self._next_rows_s = True, now + ROWS_INTERVAL_S
        self._asks.submit(self._ask_rows)

    def _ask_rows(self) -> None:
        assert self.objects is not None
        try:
            rows = [shown(row) for row in self.objects.store.rows()]
            if rows != self._told_rows:
                self._told_rows = rows
                self._tell({"op": "tiers", "rows": rows})
        except BaseException as error:  # as above
            logger.debug("kvlab: the tiers gave no counters: %s", type(error).__name__)
        finally:
            self._are_rows_asked = False
