"""Objects in a cache server's memory that engines copy from where they lie."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable

from kvlab.errors import FormatError
from kvlab.page_objects import PageObjects
from kvlab.stores import Store
from kvlab.stores.memory import Loan, MemoryStore
from kvlab.stores.memory.arena import Region
from kvlab.stores.tiered import TieredStore
from kvlab.tierworker.link import Message
from kvlab.tierworker.messages import Place, given_back

logger = logging.getLogger("kvlab.serve")
MOST_LENT = 0.5  # of the memory, to all sessions: what is lent cannot be evicted
MOST_LOANS = 8192  # of all sessions: each eviction looks at them
LOAN_S = 30.0  # a copy takes milliseconds; objects that stay where they are leave no room for longer ones


class Lender:
    """The memory tier of a server, if other processes can map it: one that stands alone, or first in a stack."""

    def __init__(self, store: Store) -> None:
        self._guard = store.tiers[0] if isinstance(store, TieredStore) else None
        first = store if self._guard is None else self._guard.store
        self._memory = first if isinstance(first, MemoryStore) and first.fd >= 0 else None
        self.name = first.name
        self.fd = -1 if self._memory is None else self._memory.fd
        self.num_bytes = 0 if self._memory is None else self._memory.lent_bytes
        self.most_bytes = int(self.num_bytes * MOST_LENT)
        self.lent_bytes = self.num_loans = 0  # an object counts once, however many have it
        self._readers: Counter[Region] = Counter()
        self._lock = threading.Lock()

    def lend(self, key: str) -> Loan | None:
        if self._memory is None or (self._guard is not None and not self._guard.may_read(key)):
            return None
        return self._memory.lend(key, counts_miss=False)  # it is asked for again, and counted then

    def end(self, loan: Loan, *, was_hit: bool) -> None:
        assert self._memory is not None
        self._memory.end(loan, was_hit=was_hit)

    def take(self, loan: Loan) -> bool:
        """Whether a session may have it until `give_back`."""
        with self._lock:
            more = 0 if self._readers[loan.region] else loan.region.span
            if self.num_loans >= MOST_LOANS or self.lent_bytes + more > self.most_bytes:
                return False
            self._readers[loan.region] += 1
            self.lent_bytes += more
            self.num_loans += 1
            return True

    def give_back(self, loan: Loan) -> None:
        with self._lock:
            self.num_loans -= 1
            self._readers[loan.region] -= 1
            if not self._readers[loan.region]:
                del self._readers[loan.region]
                self.lent_bytes -= loan.region.span

    def offset(self, loan: Loan) -> int:
        """Of the value in the memory."""
        return loan.region.start


class Loans:
    """What one session has been lent. An object stays where it is until it is given back, or the session is closed:
    that must come after its socket's end, by which the engine knows that what it has copied may be other bytes."""

    def __init__(self, lender: Lender) -> None:
        self.name, self.fd, self.num_bytes = lender.name, lender.fd, lender.num_bytes
        self._lender = lender
        self._loans: dict[int, tuple[Loan, float]] = {}  # by the number of the request, with its time, the oldest first
        self._is_closed = False
        self._lock = threading.Lock()

    def lend(self, place: Place, objects: PageObjects, shape: tuple[int, ...]) -> int | None:
        """At which byte of the memory the slots of the object at `place` begin; None where it cannot be lent: it is not
        in memory, is not stored as slots are, is broken, or too much is lent."""
        found = self._checked(place, objects, shape)
        if found is None:
            return None
        loan, at = found
        with self._lock:
            is_kept = not self._is_closed and place.id not in self._loans and self._lender.take(loan)
            if is_kept:
                self._loans[place.id] = (loan, time.monotonic())
        if not is_kept:
            self._lender.end(loan, was_hit=False)
            return None
        return self._lender.offset(loan) + at

    def check(self, place: Place, objects: PageObjects, shape: tuple[int, ...]) -> None:
        """Check the object now, so that the first who wants it need not wait for that."""
        if found := self._checked(place, objects, shape):
            self._lender.end(found[0], was_hit=False)

    @property
    def are_overdue(self) -> bool:
        """Whether one has been kept for longer than `LOAN_S`."""
        with self._lock:
            oldest = next(iter(self._loans.values()), None)
        return oldest is not None and time.monotonic() - oldest[1] > LOAN_S

    def hear(self, message: Message) -> None:
        """The engine gives objects back; LinkError where it does not say which."""
        self.give_back(given_back(message))

    def give_back(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with self._lock:
                found = self._loans.pop(number, None)
            if found is not None:
                self._lender.give_back(found[0])
                self._lender.end(found[0], was_hit=True)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self.give_back(list(self._loans))

    def _checked(self, place: Place, objects: PageObjects, shape: tuple[int, ...]) -> tuple[Loan, int] | None:
        """The object, and where in it its slots begin. Checksum and MAC are of bytes that do not change, so they are
        checked once for each key; what a reader expects is checked each time."""
        key = objects.namespace.key(bytes.fromhex(place.hash))
        loan = self._lender.lend(key)
        if loan is None:
            return None
        check = "checksum" if objects.auth is None else f"mac:{objects.auth.id}"
        at: int | None = None
        try:
            at = objects.place(
                loan.value,
                key,
                shape,
                first_token=place.first_token,
                end_token=place.end_token,
                is_sealed=check in loan.checks,
            )
        except FormatError as error:  # who copies it learns the same, and sets it aside
            logger.debug("kvlab serve: %s is not lent: %s", key, error)
        finally:
            if at is None:
                self._lender.end(loan, was_hit=False)
        if at is None:
            return None
        loan.checks.add(check)
        return loan, at
