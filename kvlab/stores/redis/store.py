"""A tier in Redis (or Valkey): one key per object, shared by every process that can reach the server."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from kvlab.errors import StoreError
from kvlab.hostmemory import aligned
from kvlab.stores.base import Buffer, Value, ValueTooLongError, buffers, check_fits, cut, fits_key
from kvlab.stores.redis.listing import listed
from kvlab.stores.redis.node import NodeDownError
from kvlab.stores.redis.removal import HEAD_BYTES, remove
from kvlab.stores.redis.replies import SIZE, Answers, memory_facts, name_of, size_in, told_limit
from kvlab.stores.redis.resp import (
    BufferFactory,
    ReplyError,
    RespConnection,
    flag,
    number,
    ok,
    send_command,
    send_pipeline,
)
from kvlab.stores.redis.topology import Topology, make_topology
from kvlab.stores.redis.url import RedisTarget
from kvlab.stores.remote import RemoteStore
from kvlab.stores.shown import call_of
from kvlab.stores.url import StoreURL
from kvlab.stores.wire import ProtocolError
from kvlab.units import parse_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")
Work = Callable[[float], Callable[[RespConnection], T]]  # of a deadline, on a connection
DEFAULT_LIMIT = 512 << 20  # Redis' own default of proto-max-bulk-len
LEAST_LIMIT = 1 << 20  # no server takes less for it
LIMIT_KEPT_S = 30.0  # what a server said; CONFIG SET and a restart change it
PIPELINED = 8192  # keys asked for at once: a deadline is for this many, and a reply has bounds

_NOT_OURS = frozenset({"wrongtype"})  # another program's list or hash: no value of ours is there
_ELSEWHERE = frozenset({"moved", "ask"})


class RedisStore(RemoteStore):
    """Values in a Redis server, behind sentinels, or spread over a cluster (`kvlab.stores.redis.topology`).

    The budget is the server's ``maxmemory`` and the order of leaving its ``maxmemory-policy``: give it both, for
    many clients share it. Every call ends within `timeout_s`; a server that fails is left alone for `first_wait_s`,
    doubled up to `longest_wait_s`, and tried again. Failures are counted by reason (``stats()["error_timeout"]``).
    With a cluster, the keys of a failed node are misses while the others answer.

    Parameters
    ----------
    ttl_s
        seconds a value lives on the server; 0 for ever.
    limit
        values over this many bytes are refused before anything is sent, and not read either; None is 512 MiB, or
        the server's own limit if that is less.
    """

    def __init__(
        self,
        target: RedisTarget,
        *,
        timeout_s: float = 1.0,
        ttl_s: float = 0.0,
        limit: int | None = None,
        first_wait_s: float = 0.25,
        longest_wait_s: float = 10.0,
        name: str = "redis",
    ) -> None:
        super().__init__(name, timeout_s)
        self._topology: Topology = make_topology(target, first_wait_s, longest_wait_s)
        self._ttl_ms = max(1, round(ttl_s * 1000)) if ttl_s else 0
        self._limit = limit
        self._told: tuple[int, float] | None = None  # the server's own limit, and until when to go by it
        self._most = limit or DEFAULT_LIMIT
        self._server: dict[str, int] = {}

    @classmethod
    def arguments(cls, url: StoreURL) -> dict[str, Any]:
        limit = url.take("limit", "")
        return {
            "target": RedisTarget.from_url(url),
            "timeout_s": url.take_ms("timeout_ms", "1000"),
            "ttl_s": url.take_ms("ttl_ms", "0"),
            "limit": parse_bytes(limit) if limit else None,
            "first_wait_s": url.take_ms("retry_ms", "250"),
            "longest_wait_s": url.take_ms("longest_retry_ms", "10000"),
        }

    def _as_call(self) -> str:
        return call_of(self, self._topology.place)

    def put(self, key: str, value: Value) -> bool:
        start = time.perf_counter()
        pieces = buffers(value)
        size = sum(piece.nbytes for piece in pieces)
        command: list[Any] = ["SET", name_of(key), pieces, *(["PX", str(self._ttl_ms)] if self._ttl_ms else [])]
        if not fits_key(key):
            return self._refuse("key_too_long")
        deadline = self._deadline()
        try:
            if size > self._value_limit(deadline):
                return self._refuse("too_large")
            self._run(key, lambda deadline: send_command(command, deadline, ok), deadline)
        except ReplyError as error:
            if error.reason == "oom":
                return self._refuse("maxmemory")
            self._told = None
            raise
        except NodeDownError:
            self._told = None  # it may have hung up because the value is too long for it by now
            if self._others_answer():
                return self._refuse("node_down")
            raise
        self._stored(key, size, start)
        return True

    def get(self, key: str) -> Buffer | None:
        got = self._read(key, _room)
        return None if got is None else got[0]

    def get_into(self, key: str, out: memoryview) -> int | None:
        return self.get_pieces(key, [out])

    def get_pieces(self, key: str, out: Sequence[memoryview]) -> int | None:
        def room(size: int) -> list[memoryview]:
            check_fits(key, size, out)
            return cut(out, size)

        got = self._read(key, room)
        return None if got is None else sum(piece.nbytes for piece in got)

    def get_head(self, key: str, num_bytes: int) -> Buffer | None:
        return self._head(key, num_bytes, self._deadline())

    def size_of(self, key: str) -> int | None:
        return self._size_of(key, self._deadline())

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """One round trip per server and 8,192 keys, each with a deadline of its own."""
        return [size_in(answers) is not None for answers in self._pipelined(SIZE, keys)]

    def touch(self, keys: Iterable[str]) -> None:
        self._pipelined(["TOUCH"], list(keys))

    def delete(self, key: str) -> bool:
        return self._remove(key, None, "deleted")

    def renew(self) -> None:
        """A connection that is out of step gives other keys' values for ever."""
        self._topology.renew()

    def quarantine(self, key: str, reason: str, found: Value | None = None) -> bool:
        there = self._remove(key, found, f"set_aside:{'_'.join(reason.split())}")
        self.counters.dropped += there
        return there

    def keys(self) -> Iterator[str]:
        """A server that lists for longer than 60 deadlines, or names that take more than 512 MiB, has failed."""
        try:
            return iter(listed(self._topology.nodes(self._deadline()), self._timeout_s))
        except StoreError as error:
            self._failed(error)
            raise

    @property
    def max_bytes(self) -> int:  # type: ignore[override]
        """The servers' ``maxmemory`` together; where none is set, their whole memory. As last heard."""
        if "max_bytes" not in self._server:
            self._ask_server()
        return self._server.get("max_bytes", 0)

    @property
    def used_bytes(self) -> int:
        """Memory that the servers use, for other programs' keys too. The last known value if they do not answer."""
        self._ask_server()
        return self._server.get("used_bytes", 0)

    def close(self) -> None:
        self._topology.close()

    @property
    def is_up(self) -> bool:
        """Of a cluster, whether some node answers."""
        known = list(self._topology.known())
        return not known or any(node.health.is_up for node in known)

    # ---- calls

    def _is_up(self) -> bool:
        return all(node.health.is_up for node in self._topology.known())

    def _run(self, key: str, work: Work[T], deadline: float | None = None) -> T:
        """`work` of a deadline, on the server of `key`. A call of several questions gives the deadline of them all."""
        deadline = self._deadline() if deadline is None else deadline
        try:
            return self._topology.run(name_of(key), work(deadline), deadline)
        except ValueTooLongError:
            raise
        except StoreError as error:
            self._failed(error)
            raise

    def _asked(self, key: str, work: Work[T], default: D, deadline: float | None = None) -> T | D:
        """Like `_run`, with `default` for keys of a cluster's failed node."""
        try:
            return self._run(key, work, deadline)
        except NodeDownError:
            if self._others_answer():
                return default
            raise

    def _size_of(self, key: str, deadline: float) -> int | None:
        return size_in(self._pipelined_at_once(SIZE, [key], deadline)[0])

    def _head(self, key: str, num_bytes: int, deadline: float) -> Buffer | None:
        def room(size: int) -> list[memoryview]:
            if size > num_bytes:
                raise ProtocolError(f"the server announced {size} bytes where at most {num_bytes} were asked for")
            return _room(size)

        size = self._size_of(key, deadline)
        if not size or not num_bytes:
            return None if size is None else b""
        got = self._read(key, room, ["GETRANGE", name_of(key), "0", str(num_bytes - 1)], deadline)
        return got[0] if got and got[0].nbytes else None  # by now it may be gone

    def _read(
        self, key: str, room: BufferFactory, command: Sequence[Any] | None = None, deadline: float | None = None
    ) -> Sequence[memoryview] | None:
        start = time.perf_counter()
        command = command or ["GET", name_of(key)]

        def fetch(deadline: float) -> Callable[[RespConnection], Sequence[memoryview] | None]:
            return lambda connection: connection.fetch(command, deadline, room, self._most)

        try:
            value = self._asked(key, fetch, default=None, deadline=deadline)
        except ReplyError as error:
            if error.reason not in _NOT_OURS:
                raise
            value = None
        self._was_read(value, start)
        return value

    def _pipelined(self, commands: Sequence[str], keys: Sequence[str]) -> list[Answers]:
        """The answers to these commands for each key, none where a node of the cluster is down."""
        found: list[Answers] = []
        for at in range(0, len(keys), PIPELINED):
            found += self._pipelined_at_once(commands, keys[at : at + PIPELINED], self._deadline())
        return found

    def _pipelined_at_once(self, commands: Sequence[str], keys: Sequence[str], deadline: float) -> list[Answers]:
        names = [name_of(key) for key in keys]
        nothing: Answers = []
        answers = [nothing] * len(keys)
        try:
            groups = self._topology.group(names, deadline)
        except StoreError as error:
            self._failed(error)
            raise
        failures: list[StoreError] = []
        for node, places in groups.items():
            asked = [[command, names[place]] for place in places for command in commands]
            try:
                replies = node.run(send_pipeline(asked, deadline, number, _NOT_OURS | _ELSEWHERE), deadline)
            except StoreError as error:
                self._failed(error)
                failures.append(error)
                continue
            for index, place in enumerate(places):
                answers[place] = replies[index * len(commands) : (index + 1) * len(commands)]
                if any(isinstance(reply, ReplyError) and reply.reason in _ELSEWHERE for reply in answers[place]):
                    answers[place] = self._one_by_one(commands, keys[place], deadline)
        if failures and len(failures) == len(groups):
            raise failures[0]
        return answers

    def _one_by_one(self, commands: Sequence[str], key: str, deadline: float) -> Answers:
        """A node that is taking a slot over answers a single command after each ASKING."""
        found: Answers = []
        for command in commands:
            work: Work[Answers] = partial(send_pipeline, [[command, name_of(key)]], parse=number, leave=_NOT_OURS)
            answer = self._asked(key, work, default=None, deadline=deadline)
            if answer is None:
                return []
            found += answer
        return found

    def _ask_server(self) -> None:
        """Refresh what is known of the servers; a server that does not answer keeps its last numbers."""
        totals: Counter[str] = Counter()
        deadline = self._deadline()
        try:
            for node in self._topology.nodes(deadline):
                totals.update(node.run(send_command(["INFO", "memory"], deadline, memory_facts), deadline))
        except StoreError as error:
            self._failed(error)
            return
        if "max_bytes" not in self._server and totals["unbounded"]:
            log.warning("Redis has no maxmemory: it will grow; set maxmemory and maxmemory-policy allkeys-lru")
        self._server |= totals

    def _value_limit(self, deadline: float) -> int:
        """The longest value that is sent. What a server says of itself is asked for again, and believed only where a
        server can have such a limit: a wrong one would refuse every value."""
        if self._limit is not None:
            return self._limit
        told = self._told
        if told is None or time.monotonic() >= told[1]:
            try:
                node = self._topology.nodes(deadline)[0]
                limit = node.run(send_command(["CONFIG", "GET", "proto-max-bulk-len"], deadline, told_limit), deadline)
            except ReplyError:  # not allowed to ask
                limit = 0
            except StoreError as error:
                self._failed(error)
                raise
            limit = min(limit, DEFAULT_LIMIT) if limit >= LEAST_LIMIT else DEFAULT_LIMIT
            told = self._told = (limit, time.monotonic() + LIMIT_KEPT_S)
        return told[0]

    def _others_answer(self) -> bool:
        known = self._topology.known()
        return self._topology.place.kind == "cluster" and any(node.health.is_up for node in known)

    def _remove(self, key: str, found: Value | None, why: str) -> bool:
        deadline, name = self._deadline(), name_of(key)
        script: Work[bool | None] = partial(remove, name, found)
        there = self._asked(key, script, default=False, deadline=deadline)
        if there is None:  # without scripts another client may write between these two questions
            unlink: Work[bool] = partial(send_command, ["UNLINK", name], parse=flag)
            there = self._is(key, found, deadline) and self._asked(key, unlink, default=False, deadline=deadline)
        if there:
            self._left(key, why)
        return there

    def _is(self, key: str, found: Value | None, deadline: float) -> bool:
        """Whether there is a value; one that `found` is, or the head of, where that is given."""
        if found is None:
            return self._size_of(key, deadline) is not None
        wanted = b"".join(buffers(found))
        head = self._head(key, max(len(wanted), HEAD_BYTES), deadline)
        return head is not None and bytes(head) == wanted


def _room(size: int) -> list[memoryview]:
    return [aligned(size)[:size]]
