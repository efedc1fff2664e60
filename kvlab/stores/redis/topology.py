"""Which server holds a key: one server, the master that sentinels name, or a cluster's node of the key's slot."""

import binascii
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.redis.node import NodeDownError, RedisNode
from kvlab.stores.redis.resp import Reply, ReplyError, RespConnection, array, number, send_command, text
from kvlab.stores.redis.url import RedisTarget
from kvlab.stores.wire import ProtocolError

T = TypeVar("T")
Address = tuple[str, int]
MOST_REDIRECTS = 5
MOST_NODES = 1024  # of a cluster, or masters that sentinels name; a server that names ever others is not followed
NUM_SLOTS = 16384
_HOST = re.compile(r"[0-9A-Za-z_.:%-]{1,253}")


class Topology(ABC):
    """Runs work on the server responsible for a key, and finds out who that is."""

    def __init__(self, place: RedisTarget, first_wait_s: float, longest_wait_s: float) -> None:
        self.place = place
        self._waits = (first_wait_s, longest_wait_s)

    @abstractmethod
    def group(self, keys: list[bytes], deadline: float) -> dict[RedisNode, list[int]]:
        """Positions of `keys` by responsible server."""

    @abstractmethod
    def nodes(self, deadline: float) -> list[RedisNode]:
        """All servers that hold keys."""

    @abstractmethod
    def run(self, key: bytes, work: Callable[[RespConnection], T], deadline: float) -> T:
        """`work` on the server responsible for `key`, following it where it has moved."""

    @abstractmethod
    def known(self) -> list[RedisNode]:
        """The servers known so far, without a network call."""

    def _node(self, address: Address | str) -> RedisNode:
        return RedisNode(address, self.place.login, CircuitBreaker(*self._waits))

    def renew(self) -> None:
        """Let the next calls make connections of their own."""
        for node in self.known():
            node.close_idle()

    def close(self) -> None:
        self.renew()


class Single(Topology):
    """One server, at a TCP address or a unix socket."""

    def __init__(self, place: RedisTarget, first_wait_s: float, longest_wait_s: float) -> None:
        super().__init__(place, first_wait_s, longest_wait_s)
        self._only = self._node(place.socket_path or place.hosts[0])

    def group(self, keys: list[bytes], deadline: float) -> dict[RedisNode, list[int]]:
        return {self._only: list(range(len(keys)))}

    def nodes(self, deadline: float) -> list[RedisNode]:
        return [self._only]

    def run(self, key: bytes, work: Callable[[RespConnection], T], deadline: float) -> T:
        return self._only.run(work, deadline)

    def known(self) -> list[RedisNode]:
        return [self._only]


class Sentinel(Topology):
    """The master that most sentinels can name. Whenever it fails or turns out to be a replica they are asked again."""

    def __init__(self, place: RedisTarget, first_wait_s: float, longest_wait_s: float) -> None:
        super().__init__(place, first_wait_s, longest_wait_s)
        self._sentinels = [RedisNode(host, place.sentinel_login, CircuitBreaker(0.05, 1.0)) for host in place.hosts]
        self._by_address: dict[Address, RedisNode] = {}
        self._master: RedisNode | None = None

    def group(self, keys: list[bytes], deadline: float) -> dict[RedisNode, list[int]]:
        return {self._find(deadline): list(range(len(keys)))}

    def nodes(self, deadline: float) -> list[RedisNode]:
        return [self._find(deadline)]

    def run(self, key: bytes, work: Callable[[RespConnection], T], deadline: float) -> T:
        master = self._find(deadline)
        try:
            return master.run(work, deadline)
        except NodeDownError:
            self._master = None
            named = self._find(deadline)
            if named is master:
                raise
            return named.run(work, deadline)

    def known(self) -> list[RedisNode]:
        return [*self._by_address.values(), *self._sentinels]

    def _find(self, deadline: float) -> RedisNode:
        if self._master is not None and self._master.health.is_up:
            return self._master
        for sentinel in list(self._sentinels):
            if time.monotonic() >= deadline:  # as in a cluster
                break
            share = min(deadline, time.monotonic() + max(0.05, (deadline - time.monotonic()) / 3))
            question = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.place.master]
            try:
                address = sentinel.run(send_command(question, share, _master), share)
            except (NodeDownError, ReplyError):
                continue
            if address is not None:
                others = [other for other in self._sentinels if other is not sentinel]
                self._sentinels = [sentinel, *others]  # the one that answered is asked first next time
                if address not in self._by_address:
                    while len(self._by_address) >= MOST_NODES:
                        self._by_address.pop(next(iter(self._by_address))).close_idle()
                    self._by_address[address] = self._node(address)
                self._master = self._by_address[address]
                return self._master
        raise NodeDownError(f"no sentinel names a master {self.place.master!r}", reason="no_master")


class Cluster(Topology):
    """Slots by server, learnt from any node and learnt again when one redirects or fails."""

    def __init__(self, place: RedisTarget, first_wait_s: float, longest_wait_s: float) -> None:
        super().__init__(place, first_wait_s, longest_wait_s)
        self._by_address: dict[Address, RedisNode] = {}
        self._slots: list[RedisNode | None] = []
        self._gaps = CircuitBreaker(first_wait_s, longest_wait_s)  # slots of no node: when to ask for their owner again

    def group(self, keys: list[bytes], deadline: float) -> dict[RedisNode, list[int]]:
        groups: dict[RedisNode, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(self._owner(key, deadline), []).append(index)
        return groups

    def nodes(self, deadline: float) -> list[RedisNode]:
        slots = self._slots or self._learn(deadline)
        return list({node: None for node in slots if node is not None})

    def run(self, key: bytes, work: Callable[[RespConnection], T], deadline: float) -> T:
        node, asking = self._owner(key, deadline), False
        for _ in range(MOST_REDIRECTS):
            try:
                return node.run(_after_asking(work, deadline) if asking else work, deadline)
            except ReplyError as error:
                if error.reason not in ("moved", "ask"):
                    raise
                asking = error.reason == "ask"
                was, node = node, self._at(_redirected(error, node))
                if not asking:
                    self._learn(deadline, first=was)
            except NodeDownError:
                self._learn(deadline)  # a replica may have taken over
                owner = self._owner(key, deadline)
                if owner is node or not owner.health.is_up:
                    raise
                node, asking = owner, False
        raise NodeDownError(f"the cluster redirects {key!r} in circles", reason="redirects")

    def known(self) -> list[RedisNode]:
        return list(self._by_address.values())

    def _at(self, address: Address) -> RedisNode:
        node = self._by_address.get(address)
        if node is None:
            if len(self._by_address) >= MOST_NODES:  # no real cluster: learn the topology again
                self.close()
                self._by_address, self._slots = {}, []
            node = self._by_address[address] = self._node(address)
        return node

    def _owner(self, key: bytes, deadline: float) -> RedisNode:
        slot = key_slot(key)
        node = (self._slots or self._learn(deadline))[slot]
        if node is None and self._gaps.may_ask():
            node = self._learn(deadline)[slot]
            if node is None:
                self._gaps.failed()
            else:
                self._gaps.succeeded()
        if node is None:
            raise NodeDownError(f"no node of the cluster serves slot {slot}", reason="clusterdown")
        return node

    def _learn(self, deadline: float, first: RedisNode | None = None) -> list[RedisNode | None]:
        candidates = [*([first] if first else []), *self.known(), *map(self._at, self.place.hosts)]
        for node in dict.fromkeys(sorted(candidates, key=lambda node: not node.health.is_up)):
            if time.monotonic() >= deadline:  # a node that was not asked has not failed
                raise NodeDownError("no node of the cluster answered in time", reason="timeout")
            share = min(deadline, time.monotonic() + max(0.05, (deadline - time.monotonic()) / 3))
            try:
                parse = partial(_ranges, own_host=_host_of(node))
                ranges = node.run(send_command(["CLUSTER", "SLOTS"], share, parse), share)
            except (NodeDownError, ReplyError):
                continue
            slots: list[RedisNode | None] = [None] * NUM_SLOTS
            for low, high, address in ranges:
                slots[low : high + 1] = [self._at(address)] * (high + 1 - low)
            self._slots = slots  # at once: other threads read it
            return slots
        raise NodeDownError("no node of the cluster answers", reason="unreachable")


def make_topology(place: RedisTarget, first_wait_s: float, longest_wait_s: float) -> Topology:
    kinds: dict[str, type[Topology]] = {"single": Single, "sentinel": Sentinel, "cluster": Cluster}
    return kinds[place.kind](place, first_wait_s, longest_wait_s)


def key_slot(key: bytes) -> int:
    """The cluster's slot of a key, or of the part in its first braces: CRC16 (XMODEM) modulo 16,384.

    >>> key_slot(b"123456789"), key_slot(b"x{123456789}y")
    (12739, 12739)
    """
    start = key.find(b"{") + 1
    end = key.find(b"}", start) if start else -1
    return binascii.crc_hqx(key[start:end] if end > start else key, 0) % NUM_SLOTS


def _address(host: str, port: int) -> Address:
    if not _HOST.fullmatch(host) or not 0 < port < 1 << 16:
        raise ProtocolError(f"the server named a host of {len(host)} characters at port {port}, which is no address")
    return host, port


def _master(reply: Reply) -> Address | None:
    if reply is None:
        return None
    host, port = map(text, array(reply, 2)[:2])
    return _address(host, int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0)


def _ranges(reply: Reply, own_host: str) -> list[tuple[int, int, Address]]:
    """What CLUSTER SLOTS says: first slot, last slot, owner. A node that does not know its own name leaves it empty.

    Each slot has one owner, so the ranges hold no more slots together than there are.
    """
    found: list[tuple[int, int, Address]] = []
    num_slots = 0
    for entry in array(reply):
        low, high, owner = array(entry, 3)[:3]
        host, port = array(owner, 2)[:2]
        if number(low, NUM_SLOTS - 1) > number(high, NUM_SLOTS - 1):
            raise ProtocolError(f"the server named slots from {low} to {high}")
        num_slots += high + 1 - low
        if num_slots > NUM_SLOTS:
            raise ProtocolError(f"the server named more than {NUM_SLOTS} slots")
        found.append((low, high, _address((text(host) if host is not None else "") or own_host, number(port))))
    if len({address for _, _, address in found}) > MOST_NODES:
        raise ProtocolError(f"the server named more than {MOST_NODES} nodes")
    return found


def _redirected(error: ReplyError, node: RedisNode) -> Address:
    """Where MOVED or ASK points to."""
    host, _, port = error.target.reveal().rpartition(":")
    return _address(host or _host_of(node), int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0)


def _host_of(node: RedisNode) -> str:
    return node.address if isinstance(node.address, str) else node.address[0]


def _after_asking(work: Callable[[RespConnection], T], deadline: float) -> Callable[[RespConnection], T]:
    def asked(connection: RespConnection) -> T:
        connection.call(["ASKING"], deadline)
        return work(connection)

    return asked
