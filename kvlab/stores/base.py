"""What a store is: bytes in a tier, within a budget."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self, TypeAlias

from kvlab.errors import StoreError
from kvlab.stores.shown import table_of

Buffer: TypeAlias = bytes | bytearray | memoryview
Value: TypeAlias = Buffer | Sequence[Buffer]


MAX_KEY_BYTES = 1024  # of a key in UTF-8; the chain's keys are a tenth of that


class ValueTooLongError(StoreError):
    """The value does not fit the buffer of `get_into`: an error of the caller, not of the medium."""


@dataclass
class StoreCounters:
    """Counters of one tier since it was opened. Bytes and seconds cover successful calls only."""

    puts: int = 0
    put_bytes: int = 0
    put_s: float = 0.0
    hits: int = 0
    misses: int = 0
    get_bytes: int = 0
    get_s: float = 0.0
    evictions: int = 0
    evicted_bytes: int = 0
    refused: int = 0  # larger than the whole budget, or no room could be made
    errors: int = 0  # the medium failed
    dropped: int = 0  # broken objects set aside or removed


def fits_key(key: str) -> bool:
    """Whether stores take `key`: files and journals hold it as their name, at up to three characters a byte."""
    return len(key) <= MAX_KEY_BYTES and (key.isascii() or len(key.encode("utf-8", "surrogatepass")) <= MAX_KEY_BYTES)


def buffers(value: Value) -> list[memoryview]:
    """`value` as flat byte views: one buffer, or several to be stored one after the other."""
    pieces = [value] if isinstance(value, bytes | bytearray | memoryview) else value
    return [memoryview(piece).cast("B") for piece in pieces]


def check_fits(key: str, size: int, pieces: Sequence[memoryview]) -> None:
    """Raise ValueTooLongError unless a value of `size` bytes fits these buffers."""
    if size > (most := sum(piece.nbytes for piece in pieces)):
        raise ValueTooLongError(f"value of {key!r} holds {size} bytes, the buffer only {most}")


def cut(pieces: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first `size` bytes of buffers that follow each other, as flat byte views."""
    found: list[memoryview] = []
    for piece in pieces:
        found.append(piece.cast("B")[:size])
        size -= found[-1].nbytes
    return found


def held(store: "Store", keys: Sequence[str]) -> list[bool]:
    """`contains_many` of a store that may be of another package; StoreError where it has not one answer per key."""
    answers = [bool(there) for there in store.contains_many(keys)]
    if len(answers) != len(keys):
        raise StoreError(f"store {store.name} gave {len(answers)} answers for {len(keys)} keys, must be one per key")
    return answers


class Store(ABC):
    """Bytes by key, within `max_bytes`, counting what the medium already holds.

    Every store promises (kvlab.testing.StoreTests checks it): a missing key is None, never an error; `put` keeps
    no reference to the caller's buffers; a reader sees a whole value or none; `used_bytes` never exceeds
    `max_bytes`, not for a moment; answers are positional; methods may be called from several threads, and in a
    process that is forked from the one which opened the store. A key is data: no key reaches anything but its own
    value, and one of more than `MAX_KEY_BYTES` is refused. A medium that fails or lies raises StoreError and nothing
    else, within the store's deadline; what stacks stores (tiered, engine) turns that into a miss and counts it.
    """

    name: str = "store"
    url: str = ""  # that `open_store` was given, with its secrets starred out
    max_bytes: int
    counters: StoreCounters

    @abstractmethod
    def put(self, key: str, value: Value) -> bool:
        """Store `value` (one buffer, or several in a row) under `key`, replacing what was there.

        True if it is stored now; False if it was refused because it cannot fit or its key is too long (counted,
        nothing else lost).
        """

    @abstractmethod
    def get(self, key: str) -> Buffer | None:
        """The value, or None. The caller owns the buffer. Reading counts as use (see `touch`)."""

    @abstractmethod
    def get_into(self, key: str, out: memoryview) -> int | None:
        """Read the value into `out`; its length, or None if absent. A value longer than `out` raises
        ValueTooLongError (a StoreError) and leaves `out` undefined."""

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        """`get_into` over several buffers, which the value fills one after the other. Here several mean that it is read
        whole and copied; stores that can do without the copy have their own."""
        if len(out) == 1:
            return self.get_into(key, out[0])
        value = self.get(key)
        if value is None:
            return None
        view, at = memoryview(value).cast("B"), 0
        check_fits(key, view.nbytes, out)
        for into in cut(out, view.nbytes):
            into[:] = view[at : at + into.nbytes]
            at += into.nbytes
        return at

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        """The value's first bytes, at most `num_bytes`, or None. Here it is read whole; stores that need not have their
        own: of a value that may be anything, the head says how much there should be."""
        value = self.get(key)
        return None if value is None else memoryview(value).cast("B")[:num_bytes]

    @abstractmethod
    def size_of(self, key: str) -> int | None:
        """Length of the value in bytes without reading it, or None if absent."""

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Remove; True if it was there."""

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """Keys held now, in no order; others may come and go meanwhile."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes held now, as the budget counts them."""

    def contains(self, key: str) -> bool:
        return self.size_of(key) is not None

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """One answer per key, in order."""
        return [self.contains(key) for key in keys]

    def get_many(self, keys: Sequence[str]) -> list[Buffer | None]:
        """One slot per key, None for holes."""
        return [self.get(key) for key in keys]

    def touch(self, keys: Iterable[str]) -> None:  # noqa: B027 - a store without an order has nothing to do
        """Mark as used just now, without reading. Give a prompt's keys last-first: suffixes leave before prefixes."""

    def renew(self) -> None:  # noqa: B027 - a store without connections has nothing to do
        """What was read last is broken: let the next read come by a way of its own, as that may be what is broken."""

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        """A reader found this value broken, twice and with `renew` in between: make it unreadable (and countable), keep
        it for a look if cheap. True if it was there. `found` is what was read of it, whole or from its start on: where
        by now another lies there, that one stays."""
        if (found is not None and not self.still_holds(key, found)) or not self.delete(key):
            return False
        self.counters.dropped += 1
        return True

    def num_in_quarantine(self) -> int:
        """Values kept for a look."""
        return 0

    def clear_quarantine(self) -> int:
        """Remove them; how many they were."""
        return 0

    def still_holds(self, key: str, found: Value) -> bool:
        """Whether the value is `found`, or begins with it where that has more than 8 bytes."""
        wanted = b"".join(buffers(found))
        head = self.get_head(key, max(len(wanted), 8))
        return head is not None and bytes(head) == wanted

    def why_missing(self, key: str) -> str:
        """Best known reason why `key` is not here: ``never_stored``, ``evicted``, ..."""
        return "never_stored"

    def clear(self) -> None:
        for key in list(self.keys()):
            self.delete(key)

    def stats(self) -> dict[str, int | float | str]:
        """One row for pandas: the tier's name, budget, fill and counters."""
        return {"tier": self.name, "max_bytes": self.max_bytes, "used_bytes": self.used_bytes, **asdict(self.counters)}

    @property
    def is_up(self) -> bool:
        """Whether the medium answered when it was last asked. A server's numbers may be the last known ones."""
        return True

    @property
    def served_by(self) -> str:
        """The name of the tier that this thread's latest value came from."""
        return self.name

    def rows(self) -> list[dict[str, int | float | str]]:
        """`stats` of every tier below, one row each; a single store is its only tier."""
        return [self.stats()]

    def _as_call(self) -> str:
        """What makes such a store where no URL did; subclasses know."""
        return object.__repr__(self)

    def __repr__(self) -> str:
        return f"open_store({self.url!r})" if self.url else self._as_call()

    def _repr_html_(self) -> str:
        try:
            return table_of(repr(self), self.rows())
        except StoreError as error:
            return table_of(f"{self!r}: {error}", [])

    def close(self) -> None:  # noqa: B027 - a store without resources has nothing to do
        """Finish writing and release what is held; a closed store is not used again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
