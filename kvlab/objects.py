"""Objects of KV in a store: encode, seal and put; get, check and decode. What is wrong is a miss with a reason."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from kvlab.auth import AuthKey
from kvlab.container import pack, packed_bytes, parse_json, unpack
from kvlab.errors import ConfigError, FormatError, StoreError
from kvlab.geometry import AXES, KVGeometry
from kvlab.hashing import Namespace
from kvlab.hostmemory import PAGE, aligned, scratch
from kvlab.serde import Encoded, Serde, get_serde, serde_to_read
from kvlab.serde.wire import Expected, from_parts, to_parts, token_range
from kvlab.stores import Store, open_store
from kvlab.stores.base import Buffer, ValueTooLongError, cut, held
from kvlab.stores.forks import Lock
from kvlab.stores.sealed import read_object

logger = logging.getLogger("kvlab")
HEADROOM_BYTES = 64 << 10  # of an object over its KV: the header, and what a codec adds where it cannot compress
MOST_GROWTH = 4  # times its KV an object may take besides: small chunks with tables of their own come near it
MAX_TOKEN_BYTES = 16 << 20  # of KV where nothing says how much a token has; models with the most have some 5 MiB
MOST_MISFITS = 1 << 16
# Reasons that say what this reader lacks: one of another version, or with other packages or tables, may read it.
_OF_THE_READER = frozenset({"version", "serde", "table", "error"})
_OF_ITS_EXPECTATION = frozenset({"wrong_shape", "wrong_dtype", "too_large"})


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


class ObjectCache:
    """KV by key in a store, under one namespace: what `CacheEngine` is made of, which has the parameters' meaning.

    Nothing a tier does raises here: a failing or lying tier is a miss with a reason, in `stats`; what a tier gives as
    its own reason is counted as ``tier_<reason>``. docs/design/container.md lists the reasons.
    """

    def __init__(
        self,
        store: Store | str,
        *,
        namespace: Namespace,
        serde: str = "naive",
        geometry: KVGeometry | None = None,
        auth: AuthKey | None = None,
    ) -> None:
        given: object = store  # from users, whatever the annotation says
        if not isinstance(given, str | Store):
            hint = "; several are one by kvlab.stores.open_stores([...])" if isinstance(given, list | tuple) else ""
            raise ConfigError(
                f"store must be a URL like 'memory://?size=1GiB' or a Store, got {type(given).__name__}{hint}"
            )
        self.namespace = namespace
        self.geometry = geometry
        self.auth = auth
        self.serde = get_serde(serde)
        self.counters = EngineCounters()
        self.store = open_store(store) if isinstance(store, str) else store
        self._owns_store = isinstance(store, str)
        self._serdes: dict[str, Serde] = {self.serde.name: self.serde}
        self._misfits: OrderedDict[str, None] = OrderedDict()  # which `save` replaces
        self._lock = Lock()  # which a forked child finds open

    def save_object(
        self,
        key: str,
        kv: torch.Tensor,
        axes: tuple[str, ...],
        *,
        first_token: int,
        end_token: int,
        confirm: Callable[[], bool] | None = None,
    ) -> bool:
        """Encode `kv`, which holds the tokens [`first_token`, `end_token`) of a prompt, and put it under `key`. Where
        others may write to `kv`, `confirm` says afterwards whether it was this object's while it was encoded; if not,
        nothing is put."""
        _check_tokens(kv, axes, first_token, end_token)
        start = time.perf_counter()
        parts, metadata = to_parts(self.serde.encode(kv, axes))
        metadata |= {"namespace": self.namespace.canonical, **token_range(first_token, end_token)}
        value = pack(key, parts, metadata, auth=self.auth)
        if confirm is not None and not confirm():
            self._save_failed("overwritten", key, None)
            return False
        if packed_bytes(value) > _most_bytes(kv.numel() * kv.element_size()):
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

    def load_object(
        self, key: str, out: torch.Tensor | None = None, *, axes: tuple[str, ...], first_token: int, end_token: int
    ) -> torch.Tensor | None:
        """The KV of tokens [`first_token`, `end_token`) of a prompt under `key`, into `out` if given; None on any
        miss, and then `out` may hold anything.

        Every byte is checked before it is given out, and the object must be what is asked for: these tokens and `axes`,
        the shape and dtype of `out`, or those of the engine's geometry.
        """
        if out is not None:
            _check_tokens(out, axes, first_token, end_token)
            if not out.is_contiguous():
                raise ConfigError("out must be contiguous; give a tensor of its own, or a view that is")
        return self._load(key, out, self._expected(axes, first_token, end_token, out))

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

    def _expected(
        self,
        axes: tuple[str, ...],
        first_token: int,
        end_token: int,
        out: torch.Tensor | None = None,
        *,
        like: torch.Tensor | None = None,
    ) -> Expected:
        """What an object of these tokens must be: as `out`, as the geometry says, or as `like` but for its tokens."""
        tokens, num_tokens = (first_token, end_token), end_token - first_token
        if out is not None:
            return Expected(axes, tuple(out.shape), name_of(out.dtype), out.numel() * out.element_size(), tokens)
        shape = [num_tokens if axis == "tokens" else None for axis in axes]
        dtype, max_bytes = None, num_tokens * MAX_TOKEN_BYTES
        if like is not None:
            dtype = name_of(like.dtype)
            shape = [num_tokens if axis == "tokens" else n for axis, n in zip(axes, like.shape, strict=True)]
        elif self.geometry is not None and axes == AXES:
            dtype, shape = self.geometry.dtype, list(self.geometry.shape(num_tokens))
            max_bytes = num_tokens * self.geometry.bytes_per_token
        return Expected(axes, tuple(shape), dtype, max_bytes, tokens)

    def _load(self, key: str, out: torch.Tensor | None, expected: Expected) -> torch.Tensor | None:
        """`load_object` with what is expected. An object is set aside only when it is broken for every reader, and a
        second read finds it broken too: a tier that answers with another object's bytes holds this one all the same.
        """
        start = time.perf_counter()
        failed: Exception | None = None
        value: Buffer | list[memoryview] | None = None
        is_there = True
        for _ in range(2):
            try:
                if failed is not None:
                    self.store.renew()
                value = None
                value = self._read(key, out, expected)
                if value is None:
                    is_there = False
                    break
                kv = self._decode(value, key, out, expected)
            except StoreError as error:
                self._missed(_reason_of_tier(error), key, error)
                return None
            except Exception as error:  # also what a serde of another package raises: it must not reach an engine
                failed = error
                if _reason_of(error) in ("version", "serde", "table"):
                    break  # which a second read would not change
                continue
            with self._lock:
                self.counters.hits += 1
                self.counters.loaded_bytes += packed_bytes(value)
                self.counters.load_s += time.perf_counter() - start
            return kv
        if failed is None:
            self._missed(self._why_missing(key), key, None)
            return None
        reason = _reason_of(failed)
        self._missed(reason, key, failed)
        if reason in _OF_ITS_EXPECTATION and out is None:
            with self._lock:
                self._misfits[key] = None
                if len(self._misfits) > MOST_MISFITS:
                    self._misfits.popitem(last=False)
        elif is_there and self._is_broken_for_all(reason):
            self._set_aside(key, reason, value)
        return None

    def _is_broken_for_all(self, reason: str) -> bool:
        """Whether no reader that looks under this key can use the object. What differs between readers and is not in
        the namespace says nothing of the object; of memory given by the caller, the namespace says the shape."""
        if reason == "auth":
            return self.auth is not None and self.namespace.fields.get("auth") == self.auth.id
        return reason not in _OF_THE_READER

    def _read(self, key: str, out: torch.Tensor | None, expected: Expected) -> Buffer | list[memoryview] | None:
        """The object of KV for `out`: bytes as they are go to where they belong, behind a header of the usual length;
        others to memory that this thread's next read uses again, as filling fresh memory takes as long as a disk."""
        if out is None:
            return self._read_whole(key, expected)
        in_place = self.serde.name == "naive" and out.device.type == "cpu" and out.is_contiguous()
        size = PAGE if in_place else out.nbytes + out.nbytes // 64 + HEADROOM_BYTES
        room = scratch("objects", size)
        pieces = [room[:PAGE], out.reshape(-1).view(torch.uint8).numpy().data] if in_place else [room]
        try:
            length = self.store.get_pieces(key, pieces)
        except ValueTooLongError:
            return self._read_whole(key, expected)
        return None if length is None else cut(pieces, length)

    def _read_whole(self, key: str, expected: Expected) -> Buffer | None:
        """The object in memory of its own, unless it is larger than any object of what is expected."""
        size, most = self.store.size_of(key), _most_bytes(expected.max_bytes)
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

    def _decode(
        self, value: Buffer | Sequence[memoryview], key: str, out: torch.Tensor | None, expected: Expected
    ) -> torch.Tensor:
        container = unpack(value, key, auth=self.auth)
        found = container.metadata
        if found.get("namespace") != self.namespace.canonical:
            raise FormatError("object belongs to another namespace than its key says", reason="wrong_namespace")
        encoded: Encoded = from_parts(container.parts, found, expected)
        serde = self._serdes.get(encoded.serde)
        if serde is None:
            serde = self._serdes[encoded.serde] = serde_to_read(encoded.serde)
        if serde.name != "naive" and not isinstance(value, bytes | bytearray | memoryview) and len(value) > 1:
            return self._decode(b"".join(value), key, out, expected)  # its parts lie where the KV is to go
        kv = serde.decode(encoded, out)
        if (tuple(kv.shape), name_of(kv.dtype)) != (tuple(encoded.shape), encoded.dtype):  # of another package's serde
            raise FormatError(f"serde {serde.name!r} decodes to {kv.dtype}{list(kv.shape)}", reason="serde")
        return kv if out is None or kv is out else out.copy_(kv)  # it may leave `out` as it was

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


def _check_tokens(kv: torch.Tensor, axes: tuple[str, ...], first_token: int, end_token: int) -> None:
    """ConfigError unless `kv` can be the KV of tokens [first_token, end_token)."""
    if not 0 <= first_token < end_token:
        raise ConfigError(f"an object must hold tokens from 0 on, got [{first_token}, {end_token})")
    if len(axes) != kv.dim():
        raise ConfigError(f"axes must name each of {kv.dim()} dimensions, got {axes}")
    if "tokens" in axes and (held := kv.shape[axes.index("tokens")]) != end_token - first_token:
        raise ConfigError(f"kv of tokens [{first_token}, {end_token}) must have as many, got {held}")


def _most_bytes(kv_bytes: int) -> int:
    """The largest object that is stored for so many bytes of KV."""
    return MOST_GROWTH * kv_bytes + HEADROOM_BYTES


def name_of(dtype: torch.dtype) -> str:
    """Torch's name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")
