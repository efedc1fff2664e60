"""Which server holds a key: one server, the master that sentinels name, or a cluster's node of the key's slot."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from redis.crc import key_slot

from kvlab.stores.backoff import Backoff
from kvlab.stores.redis_node import Node, NodeDownError
from kvlab.stores.redis_url import RedisPlace
from kvlab.stores.resp import ReplyError, Wire, one

T = TypeVar("T")
MOST_REDIRECTS = 5


class Topology(ABC):
    """Runs work on the server responsible for a key, and finds out who that is."""

    def __init__(self, place: RedisPlace, first_wait_s: float, longest_wait_s: float) -> None:
        self.place = place
        self._waits = (first_wait_s, longest_wait_s)

    @abstractmethod
    def group(self, keys: list[bytes], deadline: float) -> dict[Node, list[int]]:
        """Positions of `keys` by responsible server."""

    @abstractmethod
    def nodes(self, deadline: float) -> list[Node]:
        """All servers that hold keys."""

    @abstractmethod
    def run(self, key: bytes, work: Callable[[Wire], T], deadline: float) -> T:
        """`work` on the server responsible for `key`, following it where it has moved."""

    @abstractmethod
    def known(self) -> list[Node]:
        """The servers talked to so far; asks nobody."""

    def _node(self, address: tuple[str, int] | str) -> Node:
        return Node(address, self.place.options, Backoff(*self._waits))

    def close(self) -> None:
        for node in self.known():
            node.close()


class Single(Topology):
    """One server, at a TCP address or a unix socket."""

    def __init__(self, place: RedisPlace, first_wait_s: float, longest_wait_s: float) -> None:
        super().__init__(place, first_wait_s, longest_wait_s)
        self._only = self._node(place.socket_path or place.hosts[0])

    def group(self, keys: list[bytes], deadline: float) -> dict[Node, list[int]]:
        return {self._only: list(range(len(keys)))}

    def nodes(self, deadline: float) -> list[Node]:
        return [self._only]

    def run(self, key: bytes, work: Callable[[Wire], T], deadline: float) -> T:
        return self._only.run(work, deadline)

    def known(self) -> list[Node]:
        return [self._only]


class Sentinel(Topology):
    """The master that most sentinels can name. Whenever it fails or turns out to be a replica they are asked again."""

    def __init__(self, place: RedisPlace, first_wait_s: float, longest_wait_s: float) -> None:
        super().__init__(place, first_wait_s, longest_wait_s)
        self._sentinels = [Node(host, place.sentinel_options, Backoff(0.05, 1.0)) for host in place.hosts]
        self._by_address: dict[tuple[str, int], Node] = {}
        self._master: Node | None = None

    def group(self, keys: list[bytes], deadline: float) -> dict[Node, list[int]]:
        return {self._find(deadline): list(range(len(keys)))}

    def nodes(self, deadline: float) -> list[Node]:
        return [self._find(deadline)]

    def run(self, key: bytes, work: Callable[[Wire], T], deadline: float) -> T:
        master = self._find(deadline)
        try:
            return master.run(work, deadline)
        except NodeDownError:
            self._master = None
            named = self._find(deadline)
            if named is master:
                raise
            return named.run(work, deadline)

    def known(self) -> list[Node]:
        return [*self._by_address.values(), *self._sentinels]

    def _find(self, deadline: float) -> Node:
        if self._master is not None and self._master.health.is_up:
            return self._master
        for sentinel in list(self._sentinels):
            share = min(deadline, time.monotonic() + max(0.05, (deadline - time.monotonic()) / 3))
            try:
                named = sentinel.run(one(["SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.place.master], share), share)
            except (NodeDownError, ReplyError):
                continue
            if named:
                others = [other for other in self._sentinels if other is not sentinel]
                self._sentinels = [sentinel, *others]  # the one that answered is asked first next time
                address = (bytes(named[0]).decode(), int(bytes(named[1])))
                if address not in self._by_address:
                    self._by_address[address] = self._node(address)
                self._master = self._by_address[address]
                return self._master
        raise NodeDownError(f"no sentinel names a master {self.place.master!r}", reason="no_master")


class Cluster(Topology):
    """Slots by server, learnt from any node and learnt anew when one redirects or fails."""

    def __init__(self, place: RedisPlace, first_wait_s: float, longest_wait_s: float) -> None:
        super().__init__(place, first_wait_s, longest_wait_s)
        self._by_address: dict[tuple[str, int], Node] = {}
        self._slots: list[Node | None] = []

    def group(self, keys: list[bytes], deadline: float) -> dict[Node, list[int]]:
        groups: dict[Node, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(self._owner(key, deadline), []).append(index)
        return groups

    def nodes(self, deadline: float) -> list[Node]:
        slots = self._slots or self._learn(deadline)
        return list({node: None for node in slots if node is not None})

    def run(self, key: bytes, work: Callable[[Wire], T], deadline: float) -> T:
        node, asking = self._owner(key, deadline), False
        for _ in range(MOST_REDIRECTS):
            try:
                return node.run(_after_asking(work, deadline) if asking else work, deadline)
            except ReplyError as error:
                if error.reason not in ("moved", "ask"):
                    raise
                host, _, port = error.text.split(" ")[2].rpartition(":")
                asking = error.reason == "ask"
                was, node = node, self._at((host or _host_of(node), int(port)))
                if not asking:
                    self._learn(deadline, first=was)
            except NodeDownError:
                self._learn(deadline)  # a replica may have taken over
                owner = self._owner(key, deadline)
                if owner is node or not owner.health.is_up:
                    raise
                node, asking = owner, False
        raise NodeDownError(f"the cluster redirects {key!r} in circles", reason="redirects")

    def known(self) -> list[Node]:
        return list(self._by_address.values())

    def _at(self, address: tuple[str, int]) -> Node:
        if address not in self._by_address:
            self._by_address[address] = self._node(address)
        return self._by_address[address]

    def _owner(self, key: bytes, deadline: float) -> Node:
        slot = key_slot(key)
        node = (self._slots or self._learn(deadline))[slot]
        if node is None:
            raise NodeDownError(f"no node of the cluster serves slot {slot}", reason="clusterdown")
        return node

    def _learn(self, deadline: float, first: Node | None = None) -> list[Node | None]:
        candidates = [*([first] if first else []), *self.known(), *map(self._at, self.place.hosts)]
        for node in dict.fromkeys(sorted(candidates, key=lambda node: not node.health.is_up)):
            share = min(deadline, time.monotonic() + max(0.05, (deadline - time.monotonic()) / 3))
            try:
                ranges = node.run(one(["CLUSTER", "SLOTS"], share), share)
            except (NodeDownError, ReplyError):
                continue
            slots: list[Node | None] = [None] * 16384
            for low, high, owner, *_ in ranges:
                host = bytes(owner[0]).decode() or _host_of(node)
                slots[low : high + 1] = [self._at((host, owner[1]))] * (high + 1 - low)
            self._slots = slots  # at once: other threads read it
            return slots
        raise NodeDownError("no node of the cluster answers", reason="unreachable")


def make_topology(place: RedisPlace, first_wait_s: float, longest_wait_s: float) -> Topology:
    kinds: dict[str, type[Topology]] = {"single": Single, "sentinel": Sentinel, "cluster": Cluster}
    return kinds[place.kind](place, first_wait_s, longest_wait_s)


def _host_of(node: Node) -> str:
    return node.address if isinstance(node.address, str) else node.address[0]


def _after_asking(work: Callable[[Wire], T], deadline: float) -> Callable[[Wire], T]:
    def asked(wire: Wire) -> T:
        wire.call(["ASKING"], deadline)
        return work(wire)

    return asked
