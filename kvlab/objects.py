"""Objects of KV in a store: seal and put; get and check. What is wrong is a miss with a reason.

Here objects are bytes: `kvlab.object_cache` encodes and decodes tensors, `kvlab.page_objects` an engine's pages.
"""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kvlab.auth import AuthKey
from kvlab.container import Container, Part, pack, packed_bytes, parse_json, unpack
from kvlab.errors import ConfigError, FormatError, StoreError
from kvlab.hashing import Namespace
from kvlab.hostmemory import aligned
from kvlab.stated import token_range
from kvlab.stores import Store, open_store
from kvlab.stores.base import Buffer, ValueTooLongError, held
from kvlab.stores.forks import Lock
from kvlab.stores.sealed import read_object

logger = logging.getLogger("kvlab")
T = TypeVar("T")
Found = Buffer | list[memoryview]  # of an object on a medium: one buffer, or several in a row

HEADROOM_BYTES = 64 << 10  # of an object over its KV: the header, and what a codec adds where it cannot compress
MOST_GROWTH = 4  # times its KV an object may take besides: small chunks with tables of their own come near it
MOST_MISFITS = 1 << 16
# Reasons that say what this reader lacks: one of another version, or with other packages or tables, may read it.
_OF_THE_READER = frozenset({"version", "serde", "table", "error"})
# Reasons that say nothing of an object where what is expected is a guess, or may be any peer's word.
OF_A_GUESS = frozenset({"wrong_shape", "wrong_dtype", "too_large"})
OF_A_PEER = OF_A_GUESS | {"wrong_range", "wrong_axes"}


@dataclass
class EngineCounters:
    """Counters since the engine was made. Seconds run to the end of decoding, bytes are those on the medium."""

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)  # by reason
    loaded_bytes: int = 0
    load_s: float = 0.0
    saved: int = 0
    save_failures: Counter[str] = field(default_factory=Counter)
    tier_failures: Counter[str] = field(default_factory=Counter)  # of calls other than gets and puts, by reason
    saved_bytes: int = 0
    save_s: float = 0.0


class SealedObjects:
    """Objects by key in a store, under one namespace.

    Nothing a tier does raises here: a failing or lying tier is a miss with a reason, in `stats`; what a tier gives as
    its own reason is counted as ``tier_<reason>``. docs/design/container.md lists the reasons.
    """

    def __init__(self, store: Store | str, *, namespace: Namespace, auth: AuthKey | None = None) -> None:
        given: object = store  # from users, whatever the annotation says
        if not isinstance(given, str | Store):
            hint = "; several are one by kvlab.stores.open_stores([...])" if isinstance(given, list | tuple) else ""
            raise ConfigError(
                f"store must be a URL like 'memory://?size=1GiB' or a Store, got {type(given).__name__}{hint}"
            )
        self.namespace = namespace
        self.auth = auth
        self.counters = EngineCounters()
        self.store = open_store(store) if isinstance(store, str) else store
        self._owns_store = isinstance(store, str)
        self._misfits: OrderedDict[str, None] = OrderedDict()  # which `save` replaces
        self._lock = Lock()  # which a forked child finds open

    def put_parts(
        self,
        key: str,
        encode: Callable[[], tuple[Mapping[str, Part], Mapping[str, str]]],
        *,
        kv_bytes: int,
        first_token: int,
        end_token: int,
        confirm: Callable[[], bool] | None = None,
    ) -> bool:
        """Put the parts and the metadata that `encode` makes of `kv_bytes` of KV under `key`. Where others may write to
        that KV, `confirm` says afterwards whether it was this object's while it was encoded; if not, nothing is put."""
        start = time.perf_counter()
        parts, metadata = encode()
        named = {**metadata, "namespace": self.namespace.canonical, **token_range(first_token, end_token)}
        value = pack(key, parts, named, auth=self.auth)
        if confirm is not None and not confirm():
            self._save_failed("overwritten", key, None)
            return False
        if packed_bytes(value) > most_bytes(kv_bytes):
            self._save_failed("too_large", key, None)
            return False
        try:
            kept = self.store.put(key, value)
        except Exception as error:  # what stores of other packages raise must not reach an engine
            self._save_failed(_reason_of_tier(error), key, error)
            return False
        if not kept:
            self._save_failed("no_room", key, None)
            return False
        with self._lock:
            self._misfits.pop(key, None)
            self.counters.saved += 1
            self.counters.saved_bytes += packed_bytes(value)
            self.counters.save_s += time.perf_counter() - start
        return True

    def get_decoded(
        self,
        key: str,
        read: Callable[[], Found | None],
        decode: Callable[[Found], T],
        *,
        misfits: frozenset[str] = frozenset(),
    ) -> T | None:
        """What `decode` makes of the bytes that `read` reads under `key`; None on any miss. An object is set aside only
        when it is broken for every reader, and a second read finds it broken too: a tier that answers with another
        object's bytes holds this one all the same. `misfits`: reasons that say that an object does not fit what is
        expected, and nothing of the object itself."""
        start = time.perf_counter()
        failed: Exception | None = None
        value: Found | None = None
        is_there = True
        for _ in range(2):
            try:
                if failed is not None:
                    self.store.renew()
                value = None
                value = read()
                if value is None:
                    is_there = False
                    break
                kv = decode(value)
            except StoreError as error:
                self._missed(_reason_of_tier(error), key, error)
                return None
            except Exception as error:  # also what a serde of another package raises: it must not reach an engine
                failed = error
                if _reason_of(error) in ("version", "serde", "table"):
                    break  # which a second read would not change
                continue
            with self._lock:
                self._misfits.pop(key, None)
                self.counters.hits += 1
                self.counters.loaded_bytes += packed_bytes(value)
                self.counters.load_s += time.perf_counter() - start
            return kv
        if failed is None:
            self._missed(self._why_missing(key), key, None)
            return None
        reason = _reason_of(failed)
        self._missed(reason, key, failed)
        if reason in misfits:
            with self._lock:
                self._misfits[key] = None
                if len(self._misfits) > MOST_MISFITS:
                    self._misfits.popitem(last=False)
        elif is_there and self._is_broken_for_all(reason):
            self._set_aside(key, reason, value)
        return None

    def opened(self, value: Found, key: str, *, is_sealed: bool = False) -> Container:
        """The object's container, every byte of it checked, or `is_sealed` before; FormatError if it is broken or of
        another namespace."""
        container = unpack(value, key, auth=self.auth, is_sealed=is_sealed)
        if container.metadata.get("namespace") != self.namespace.canonical:
            raise FormatError("object belongs to another namespace than its key says", reason="wrong_namespace")
        return container

    def read_whole(self, key: str, kv_bytes: int) -> Buffer | None:
        """The object in memory of its own, unless it is larger than any object of so many bytes of KV."""
        size, most = self.store.size_of(key), most_bytes(kv_bytes)
        if size is None:
            return None
        if size > most:
            raise FormatError(f"object {key!r} has {size} bytes, at most {most} are expected", reason="too_large")
        memory = aligned(size)
        try:
            length = self.store.get_into(key, memory)  # at most `size`, though the value may have changed
        except ValueTooLongError:
            raise FormatError(f"object {key!r} grew while it was read", reason="too_large") from None
        return None if length is None else memory[:length]

    def is_misfit(self, key: str) -> bool:
        """Whether the object under `key` was found not to fit what was expected, and is still there: the next `save`
        replaces it."""
        return key in self._misfits

    def contains_many(self, hashes: Sequence[bytes]) -> list[bool]:
        """Whether each object is here, by hash; a failing tier holds nothing."""
        return self._contains([self.namespace.key(key) for key in hashes])

    def differing_fields(self, key: str) -> list[str]:
        """Fields in which the namespace of the object under `key` differs from this one; none if it is unreadable."""
        try:
            found, error = read_object(self.store, key)
            metadata = {} if found is None or error is not None else unpack(found, key).metadata
            other = parse_json(metadata["namespace"])
        except Exception:  # the medium's, and what a medium can write
            return []
        return self.namespace.differing(other) if isinstance(other, dict) else []

    def stats(self) -> dict[str, int | float]:
        """One row for pandas."""
        s = self.counters
        row: dict[str, int | float] = {"hits": s.hits, "misses": sum(s.misses.values()), "saved": s.saved}
        row |= {f"miss_{reason}": count for reason, count in s.misses.items()}
        row |= {f"save_failed_{reason}": count for reason, count in s.save_failures.items()}
        row |= {f"tier_failed_{what}": count for what, count in s.tier_failures.items()}
        row |= {"loaded_bytes": s.loaded_bytes, "load_s": s.load_s, "saved_bytes": s.saved_bytes, "save_s": s.save_s}
        if s.load_s:
            row["load_gb_per_s"] = s.loaded_bytes / s.load_s / 1e9
        return row

    def close(self) -> None:
        if self._owns_store:
            self.store.close()

    # ----

    def _is_broken_for_all(self, reason: str) -> bool:
        """Whether no reader that looks under this key can use the object. What differs between readers and is not in
        the namespace says nothing of the object; of memory given by the caller, the namespace says the shape."""
        if reason == "auth":
            return self.auth is not None and self.namespace.fields.get("auth") == self.auth.id
        return reason not in _OF_THE_READER

    def _contains(self, keys: Sequence[str]) -> list[bool]:
        try:
            return held(self.store, keys) if keys else []
        except Exception as error:
            self._tier_failed("lookup", error)
            return [False] * len(keys)

    def _keys(self) -> Iterator[str]:
        """Those that the store lists, as far as it does."""
        try:
            yield from self.store.keys()
        except Exception as error:
            self._tier_failed("keys", error)

    def _why_missing(self, key: str) -> str:
        try:
            return self.store.why_missing(key)
        except Exception as error:
            self._tier_failed("why_missing", error)
            return _reason_of_tier(error)

    def _touch(self, keys: Sequence[str]) -> None:
        try:
            self.store.touch(reversed(keys))
        except Exception as error:
            self._tier_failed("touch", error)

    def _set_aside(self, key: str, reason: str, found: Buffer | list[memoryview] | None) -> None:
        try:
            self.store.quarantine(key, reason, found)
        except Exception as error:
            self._tier_failed("quarantine", error)

    def _tier_failed(self, what: str, error: Exception) -> None:
        """Count it; told once for each reason, as a tier that is down fails at every call."""
        failure = f"{what}_{_reason_of_tier(error).removeprefix('tier_')}"
        with self._lock:
            self.counters.tier_failures[failure] += 1
            first = self.counters.tier_failures[failure] == 1
        if first:
            unforeseen = None if isinstance(error, StoreError) else error
            logger.warning("kvlab: %s in tier %s failed: %s", what, self.store.name, error, exc_info=unforeseen)

    def _missed(self, reason: str, key: str, error: Exception | None) -> None:
        with self._lock:
            self.counters.misses[reason] += 1
            unforeseen = error if reason == "error" and self.counters.misses[reason] == 1 else None
        if error is not None:
            logger.warning("kvlab: %s is a miss (%s): %s", key, reason, error, exc_info=unforeseen)

    def _save_failed(self, reason: str, key: str, error: Exception | None) -> None:
        with self._lock:
            self.counters.save_failures[reason] += 1
            first = self.counters.save_failures[reason] == 1
        if first:
            logger.warning("kvlab: %s was not saved (%s): %s", key, reason, error or "the tier cannot hold it")


def _reason_of(error: Exception) -> str:
    return error.reason if isinstance(error, FormatError) else "error"


def _reason_of_tier(error: Exception) -> str:
    """``tier_`` and the reason of a store's own; ``tier_error`` for what else is raised, which is a fault in it."""
    return f"tier_{error.reason if isinstance(error, StoreError) else 'error'}"


def most_bytes(kv_bytes: int) -> int:
    """The largest object that is stored for so many bytes of KV."""
    return MOST_GROWTH * kv_bytes + HEADROOM_BYTES


def check_range(first_token: int, end_token: int) -> None:
    """ConfigError unless tokens [first_token, end_token) can be an object's."""
    if not 0 <= first_token < end_token:
        raise ConfigError(f"an object must hold tokens from 0 on, got [{first_token}, {end_token})")
