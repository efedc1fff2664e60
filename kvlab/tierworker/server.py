"""`TierServer` carries out what one engine asks: in the worker's process, with threads of its own."""

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.auth import auth_key
from kvlab.chunking import longest_prefix, query_prefix
from kvlab.container import MAX_DIGITS
from kvlab.errors import ConfigError, KVLabError
from kvlab.hashing import HASH_BYTES, Namespace, versioned
from kvlab.hostmemory import scratch
from kvlab.page_objects import PageObjects
from kvlab.sharedmemory import SharedSlots
from kvlab.stores import Store, open_stores
from kvlab.stores.closing import close_store
from kvlab.stores.sealed import MOST_BYTES
from kvlab.system import num_cores
from kvlab.threads import Threads
from kvlab.tierworker.link import Link, LinkError, Message
from kvlab.tierworker.messages import Ask, Fill, Memory, Opening, Runs, Write, ask_of, failure, place_of
from kvlab.units import format_bytes

logger = logging.getLogger("kvlab.tiers")
# Objects that are read, checked or waited for at once: the engine's own threads need cores too.
READ_THREADS = min(max(num_cores() // 2, 4), 16)
WRITE_THREADS = 2
ASK_THREADS = 2
ROWS_INTERVAL_S = 10.0
LOOK_S = 0.2  # between looks at whether the engine lives and what is to be told
COPY_WAIT_S = 60.0  # for an engine's copy that a write waits for
STALL_S = 30.0  # at the end, a write that takes longer is left alone
READ_STALL_S = 5.0  # and a read, which is lost anyway
ABANDON_S = 0.5  # what is under way when the engine is gone
MAX_UNDER_WAY = 20_000  # requests; more are left in the socket
MAX_QUESTION_BYTES = 32 << 20
MAX_UNHEARD_BYTES = 32 << 20  # of answers that the engine does not take
NO_BUDGET = 1 << 60  # as of a bucket
MOST_NUMBER = 10**MAX_DIGITS - 1  # that a message may hold
MOST_LISTED = 10_000  # keys of the start-up line; listing more takes a while


class TierServer:
    """Serves the engine at the other end of `link` until it closes or is gone: `run`. `parent`: the process that must
    live. `store`: shared with other engines, in place of one that the engine's tiers name; then the session has a
    `token`, and `is_over` says of another token whether its session has let go of its engine's memory."""

    def __init__(
        self,
        link: Link,
        *,
        store: Store | None = None,
        parent: int = 0,
        token: str = "",
        is_over: Callable[[str], bool] | None = None,
    ) -> None:
        self.link = link
        self.objects: PageObjects | None = None
        self._given = store
        self._parent = parent
        self._token = token
        self._is_over = is_over
        self._is_left = self._is_abandoned = False
        self._namespaces: list[Namespace] = []
        self._memory: SharedSlots | None = None
        self._pages: NDArray[np.uint8] = np.empty((0, 0, 0), np.uint8)  # [slots, layers, page_bytes]
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
        if it is gone."""
        is_asked = False
        try:
            while not is_asked:
                self._wait()
                is_asked = any(self._take(message, data) for message, data in self.link.receive())
                self._tell_rows()
        except LinkError as error:
            logger.info("kvlab: the engine is gone: %s", error)
        except Exception:
            logger.exception("kvlab: the tier worker ends")
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
        if self._is_left:
            raise LinkError("the server stops")
        if self._parent and os.getppid() != self._parent:
            raise LinkError("its process has ended")

    @property
    def _num_done(self) -> int:
        return sum(pool.num_done for pool in (self._reads, self._writes, self._asks))

    @property
    def touches_memory(self) -> bool:
        """Whether a thread may still read or write the engine's slots."""
        return any(thread.is_alive() for pool in (self._reads, self._writes) for thread in pool._threads)

    def leave(self) -> None:
        """End soon, as if the engine were gone."""
        self._is_left = True

    def _take(self, message: Message, data: bytes) -> bool:
        """Begin what a message asks for. Whether it asks to close."""
        op = message.get("op")
        self._num_asked += op in ("fill", "write", "ask")
        if op == "over" and self._is_over is not None:
            self._tell({"op": "over", "is_over": self._is_over(str(message.get("token")))})
        elif op == "opening" and self.objects is None:
            self._open(Opening.of(message))
        elif self.objects is None:
            raise LinkError("the tiers are not open")
        elif op == "memory" and self._memory is None:
            self._map(Memory.of(message), self.link.take_fd())
        elif op in ("fill", "write"):
            place = place_of(message, num_slots=len(self._pages), num_ranks=len(self._namespaces))
            if place.num_slots * self._pages[0].nbytes > MOST_BYTES:
                raise LinkError(f"an object of {place.num_slots} slots is larger than any")
            if isinstance(place, Fill):
                self._reads.submit(self._fill, place)
            else:
                self._writes.submit(self._write, place)
        elif op == "ask":
            question = ask_of(message, data)
            with self._lock:
                self._question_bytes += len(data)
            self._asks.submit(self._ask, *question)
        elif op == "close":
            return True
        else:
            raise LinkError("a message asks for nothing that there is")
        return False

    def _end(self, *, drain: bool) -> None:
        self._is_abandoned = not drain
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

    # ---- what is asked

    def _open(self, opening: Opening) -> None:
        try:
            if self._token and opening.tiers:
                raise ConfigError("an attached engine brings no tiers of its own; name the socket alone")
            store = self._given if self._given is not None else open_stores(opening.tiers)
            named = [Namespace(str(each["model"]), dict(each["fields"])) for each in opening.namespaces]
            auth = auth_key(opening.auth)
            self._namespaces = named
            kinds = {"serde": opening.serde, "slots": opening.slots}
            self.objects = PageObjects(store, namespace=named[0], **kinds, auth=auth)
        except (KVLabError, ImportError, OSError, ValueError, TypeError, LookupError) as error:
            self._tell(failure(error))
            raise LinkError("the tiers could not be opened") from error
        self._tell({"op": "ready", "token": self._token})
        self._asks.submit(self._log_tiers)

    def _map(self, memory: Memory, fd: int) -> None:
        assert self.objects is not None
        try:
            self.objects.know_pages(memory.page_map, memory.layers)
            self._memory = SharedSlots(memory.num_slots, memory.layers * memory.page_bytes, fd=fd)
        except ConfigError as error:
            raise LinkError(str(error)) from error
        finally:
            os.close(fd)  # the mapping stays
        self._pages = self._memory.slots.reshape(memory.num_slots, memory.layers, memory.page_bytes)

    def _under(self, rank: int, version: str) -> PageObjects:
        assert self.objects is not None
        return self.objects.under(self._namespaces[rank], version)

    def _fill(self, fill: Fill) -> None:
        tier = ""
        try:
            objects = self._under(fill.rank, fill.version)
            place = self._in_one_run(fill.runs)
            out = place if place is not None else self._room(fill.num_slots)
            key = objects.namespace.key(bytes.fromhex(fill.hash))
            if objects.load(key, out, first_token=fill.first_token, end_token=fill.end_token):
                tier = objects.store.served_by
                if place is None:
                    self._scatter(fill.runs, out)
        except BaseException as error:  # a store of another package may raise what is no Exception
            self._failed("fill", fill.hash, error)
            tier = ""
        self._tell({"op": "filled", "id": fill.id, "tier": tier})

    def _write(self, write: Write) -> None:
        is_stored = False
        try:
            if self._has_copied(write.after) and self._holds(write):
                objects = self._under(write.rank, write.version)
                name = bytes.fromhex(write.hash)
                is_stored = objects.contains_many([name])[0] or objects.save(
                    objects.namespace.key(name),
                    self._content(write.runs),
                    first_token=write.first_token,
                    end_token=write.end_token,
                    confirm=lambda: self._holds(write),
                )
        except BaseException as error:  # as above
            self._failed("write", write.hash, error)
        self._tell({"op": "written", "id": write.id, "ok": is_stored})

    def _ask(self, ask: Ask, hashes: Sequence[bytes], last: bytes | None, in_memory: bytes) -> None:
        try:
            self._answer(ask, hashes, last, in_memory)
        finally:
            with self._lock:
                self._question_bytes -= (ask.num_hashes + ask.has_last) * HASH_BYTES + ask.num_hashes

    def _answer(self, ask: Ask, hashes: Sequence[bytes], last: bytes | None, in_memory: bytes) -> None:
        assert self.objects is not None
        store = self.objects.store
        namespaces = [versioned(namespace, ask.version) for namespace in self._namespaces]
        elsewhere = frozenset(key for key, there in zip(hashes, in_memory, strict=True) if there)

        def contains_many(keys: Sequence[bytes]) -> list[bool]:
            """Under every rank's namespace."""
            held = [True] * len(keys)
            for namespace in namespaces:
                found = store.contains_many([namespace.key(key) for key in keys])
                held = [a and b for a, b in zip(held, found, strict=True)]
            return held

        try:
            known = query_prefix(hashes, ask.chunk_blocks, contains_many, elsewhere=elsewhere, last=last)
        except BaseException as error:  # as above
            reason = str(error) if isinstance(error, KVLabError) else f"a store raised {type(error).__name__}"
            self._tell({"op": "answer", "id": ask.id, "error": reason})
            return
        step = ask.chunk_blocks
        spans = longest_prefix(hashes, step, lambda key: key in elsewhere or known.get(key, False))
        end = spans[-1].end_block if spans else 0
        wanted = hashes[end : end - end % step + step]  # the rest of the chunk behind the hit
        why = self._why_missing(namespaces[0].key(wanted[-1])) if wanted else ""
        flags = bytes(_flag(known, key) for key in [*hashes, *([] if last is None else [last])])
        self._tell({"op": "answer", "id": ask.id, "missing": why, "at": end + len(wanted) - 1}, flags)

    def _why_missing(self, key: str) -> str:
        assert self.objects is not None
        try:
            return str(self.objects.store.why_missing(key))
        except BaseException as error:  # as above
            return f"raised_{type(error).__name__}"

    # ---- slots

    def _in_one_run(self, runs: Runs) -> NDArray[np.uint8] | None:
        (first, count), *others = runs
        return None if others else self._pages[first : first + count]

    def _room(self, num_slots: int) -> NDArray[np.uint8]:
        """Memory for so many slots' content, this thread's own until its next call."""
        shape = (num_slots, *self._pages.shape[1:])
        num_bytes = num_slots * self._pages[0].nbytes
        return np.frombuffer(scratch("slots", num_bytes), np.uint8, count=num_bytes).reshape(shape)

    def _content(self, runs: Runs) -> NDArray[np.uint8]:
        """What the slots hold: in place where they lie in one run."""
        pages = self._in_one_run(runs)
        if pages is None:
            pages = self._room(sum(count for _, count in runs))
            at = 0
            for first, count in runs:
                pages[at : at + count] = self._pages[first : first + count]
                at += count
        return pages

    def _scatter(self, runs: Runs, content: NDArray[np.uint8]) -> None:
        at = 0
        for first, count in runs:
            self._pages[first : first + count] = content[at : at + count]
            at += count

    def _holds(self, write: Write) -> bool:
        """Whether the slots are of the generation that the write names."""
        assert self._memory is not None
        owners = self._memory.owners
        return all(bool((owners[first : first + count] == write.generation).all()) for first, count in write.runs)

    def _has_copied(self, number: int) -> bool:
        """Wait until the engine's saves up to `number` are in their slots: a GPU says so in shared memory."""
        assert self._memory is not None
        deadline = time.monotonic() + COPY_WAIT_S
        while int(self._memory.copied[0]) < number:
            if time.monotonic() > deadline or self._is_abandoned:
                return False
            time.sleep(0.0005)
        return True

    # ---- what is told

    def _tell(self, message: Message, data: bytes = b"") -> None:
        try:
            self.link.send(message, data)
        except LinkError:
            logger.debug("kvlab: the engine hears no more")

    def _failed(self, what: str, name: str, error: BaseException) -> None:
        logger.warning("kvlab: %s of object %s failed", what, name, exc_info=error)

    def _tell_rows(self) -> None:
        """What the tiers hold and did, now and then, if it is news."""
        if self.objects is None or self._are_rows_asked or (now := time.monotonic()) < self._next_rows_s:
            return
        self._are_rows_asked, self._next_rows_s = True, now + ROWS_INTERVAL_S
        self._asks.submit(self._ask_rows)

    def _ask_rows(self) -> None:
        assert self.objects is not None
        try:
            rows = [_shown(row) for row in self.objects.store.rows()]
            if rows != self._told_rows:
                self._told_rows = rows
                self._tell({"op": "tiers", "rows": rows})
        except BaseException as error:  # as above
            logger.debug("kvlab: the tiers gave no counters: %s", type(error).__name__)
        finally:
            self._are_rows_asked = False

    def _log_tiers(self) -> None:
        """The start-up line: what each tier holds, and how many of its objects are of the engine's namespace."""
        assert self.objects is not None
        prefix = self._namespaces[0].key(b"")
        store = self.objects.store
        try:
            rows = store.rows()
            listed = list(islice(store.keys(), MOST_LISTED + 1))
        except BaseException as error:  # as above
            logger.warning("kvlab: the secondary tiers could not be listed: %s", type(error).__name__)
            return
        found = sum(key.startswith(prefix) for key in listed[:MOST_LISTED])
        more = " or more" if len(listed) > MOST_LISTED else ""
        tiers = ", ".join(f"{row['tier']} {_held(row)}" for row in rows)
        logger.info("kvlab: %s; %d%s objects of namespace %s found", tiers, found, more, prefix.strip(":"))


def _flag(known: dict[bytes, bool], key: bytes) -> int:
    """Of a hash in an answer: 0 was not asked for, 1 is missing, 2 is there."""
    return 0 if key not in known else 1 + bool(known[key])


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    fields = ("used_bytes", "max_bytes", "evictions", "get_bytes", "put_bytes")
    numbers = {field: min(int(row.get(field, 0)), MOST_NUMBER) for field in fields}  # a bucket's budget has 19 digits
    return {"tier": str(row["tier"]), "up": int(bool(row.get("up", 1))), **numbers}


def _held(row: dict[str, Any]) -> str:
    if not row.get("up", 1):
        return f"is down ({row.get('last_error') or 'no answer'})"
    used, most = row.get("used_bytes", 0), row.get("max_bytes", 0)
    return f"holds {format_bytes(used)}" + (f" of {format_bytes(most)}" if most < NO_BUDGET else "")
