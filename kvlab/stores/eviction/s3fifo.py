"""S3-FIFO: three queues that filter what is used only once."""

from collections import OrderedDict
from collections.abc import Container, Hashable

from kvlab.stores.eviction.base import EvictionPolicy

SMALL_SHARE = 0.1
MOST_USES = 3


class S3FIFOPolicy(EvictionPolicy):
    """Newcomers wait in a small queue (a tenth of the bytes); used twice they move to the main one, else they leave
    and are remembered by name. Who comes back while remembered goes straight to the main queue, where each use buys
    another round. (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.)

    Names remembered: as many as there are keys in the main queue, as in the paper.
    """

    name = "s3fifo"

    def __init__(self) -> None:
        self._uses: dict[Hashable, int] = {}  # of all that are here
        self._small: OrderedDict[Hashable, int] = OrderedDict()  # key -> bytes
        self._main: OrderedDict[Hashable, int] = OrderedDict()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()
        self._small_bytes = 0
        self._main_bytes = 0
        self._chosen: Hashable | None = None  # by `victim`: its leaving is an eviction, any other a deletion

    def admit(self, key: Hashable, size: int) -> None:
        if key in self._uses:
            uses = self._uses[key]
            self._take_out(key)
            self._uses[key] = min(uses + 1, MOST_USES)
        else:
            self._uses[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = size
            self._main_bytes += size
        else:
            self._small[key] = size
            self._small_bytes += size

    def touch(self, key: Hashable) -> None:
        uses = self._uses.get(key)
        if uses is not None and uses < MOST_USES:
            self._uses[key] = uses + 1

    def discard(self, key: Hashable) -> None:
        if key not in self._uses:
            return
        if key == self._chosen and key in self._small:
            self._ghosts[key] = None
            while len(self._ghosts) > max(len(self._main), 1):
                self._ghosts.popitem(last=False)
        self._take_out(key)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        from_small = self._small_bytes >= SMALL_SHARE * (self._small_bytes + self._main_bytes)
        key = self._from_small(pinned) if from_small or not self._main else self._from_main(pinned)
        if key is None:
            key = self._from_main(pinned)
        if key is None:
            key = self._from_small(pinned)
        self._chosen = key
        return key

    def _from_small(self, pinned: Container[Hashable]) -> Hashable | None:
        used_again: list[Hashable] = []
        found = None
        for key in self._small:
            if pinned and key in pinned:
                continue
            if self._uses[key] > 1:
                used_again.append(key)
                continue
            found = key
            break
        for key in used_again:
            size = self._small.pop(key)
            self._small_bytes -= size
            self._main[key] = size
            self._main_bytes += size
            self._uses[key] = 0
        return found

    def _from_main(self, pinned: Container[Hashable]) -> Hashable | None:
        for _ in range((MOST_USES + 1) * len(self._main)):
            key = next(iter(self._main))
            if not (pinned and key in pinned):
                if not self._uses[key]:
                    return key
                self._uses[key] -= 1
            self._main.move_to_end(key)
        return None

    def _take_out(self, key: Hashable) -> None:
        del self._uses[key]
        if key in self._small:
            self._small_bytes -= self._small.pop(key)
        else:
            self._main_bytes -= self._main.pop(key)
