"""S3-FIFO: three queues that filter what is used only once."""

from collections.abc import Container, Hashable, Iterable

from kvlab.stores.eviction.base import EvictionPolicy
from kvlab.stores.eviction.lazy_queue import LazyQueue

MAIN_PER_SMALL = 9  # bytes of the main queue per byte of the small one, which so has a tenth of all
MOST_USES = 3
GONE = MOST_USES + 1  # stands for the uses of a key that is only remembered: too many for a touch to add one


class S3FIFOPolicy(EvictionPolicy):
    """Newcomers wait in a small queue (a tenth of the bytes); used twice they move to the main one, else they leave
    and are remembered by name. Who comes back while remembered goes straight to the main queue, where each use buys
    another round. (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1.)

    Names remembered: as many as there are keys in the main queue, as in the paper.
    """

    name = "s3fifo"

    def __init__(self) -> None:
        self._uses: dict[Hashable, int] = {}  # of all that are here or remembered: one look tells which
        self._small: dict[Hashable, int] = {}  # key -> bytes; the order is in the lines
        self._main: dict[Hashable, int] = {}
        self._small_line, self._main_line, self._ghosts = LazyQueue(), LazyQueue(), LazyQueue()
        self._small_bytes = 0
        self._main_bytes = 0
        self._chosen: Hashable | None = None  # by `victim`: its leaving is an eviction, any other a deletion

    def admit(self, key: Hashable, size: int) -> None:
        all_uses, uses = self._uses, 0
        if key in all_uses:
            uses = all_uses[key]
            if uses == GONE:
                self._ghosts.leave(key)
                self._enter_main(key, size)
                return
            uses = min(uses + 1, MOST_USES)
            self._chosen = None
            self.discard(key)
        all_uses[key] = uses
        self._small[key] = size
        self._small_line.order.append(key)
        self._small_bytes += size

    def touch(self, key: Hashable) -> None:
        uses = self._uses.get(key, GONE)
        if uses < MOST_USES:
            self._uses[key] = uses + 1

    def touch_all(self, keys: Iterable[Hashable]) -> None:
        all_uses = self._uses
        look = all_uses.get
        for key in keys:
            uses = look(key, GONE)
            if uses < MOST_USES:
                all_uses[key] = uses + 1

    def discard(self, key: Hashable) -> None:
        if key in self._small:
            self._small_bytes -= self._small.pop(key)
            self._small_line.leave(key)
            if key == self._chosen:
                self._remember(key)
            else:
                del self._uses[key]
        elif key in self._main:
            del self._uses[key]
            self._main_bytes -= self._main.pop(key)
            self._main_line.leave(key)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        self._chosen = self._search(pinned)
        return self._chosen

    def evict(self) -> Hashable | None:
        """What `victim` and `discard` do, without looking the key up again and again: simulations live on it."""
        uses, small, line = self._uses, self._small, self._small_line
        while MAIN_PER_SMALL * self._small_bytes >= self._main_bytes and small:
            key = line.order.popleft()
            if key in line.voids:
                key = line.past_voids(key)
            size = small.pop(key)
            self._small_bytes -= size
            if uses[key] <= 1:
                self._remember(key)
                return key
            self._enter_main(key, size)
        key = self._chosen = self._from_main(())
        if key is None:
            return super().evict()
        self._main_line.order.popleft()
        self._main_bytes -= self._main.pop(key)
        del uses[key]
        return key

    def _remember(self, key: Hashable) -> None:
        uses, ghosts = self._uses, self._ghosts
        uses[key] = GONE
        ghosts.order.append(key)
        if len(ghosts.order) - ghosts.num_void > (len(self._main) or 1):
            oldest = ghosts.order.popleft()
            if oldest in ghosts.voids:
                oldest = ghosts.past_voids(oldest)
            del uses[oldest]

    def _enter_main(self, key: Hashable, size: int) -> None:
        self._uses[key] = 0
        self._main[key] = size
        self._main_line.order.append(key)
        self._main_bytes += size

    def _search(self, pinned: Container[Hashable]) -> Hashable | None:
        """Whose turn it is is asked again after each move, so that asking twice gives one answer."""
        while self._small_is_full() and (key := self._small_line.first(pinned)) is not None:
            if self._uses[key] <= 1:
                return key
            self._move_on(key)
        key = self._from_main(pinned)
        if key is not None:
            return key
        while (key := self._small_line.first(pinned)) is not None:  # the main queue has no candidate
            if self._uses[key] <= 1:
                return key
            self._move_on(key)
        return self._from_main(pinned)

    def _small_is_full(self) -> bool:
        return MAIN_PER_SMALL * self._small_bytes >= self._main_bytes

    def _move_on(self, key: Hashable) -> None:
        """From the small queue to the main one."""
        size = self._small.pop(key)
        self._small_bytes -= size
        self._small_line.leave(key)
        self._enter_main(key, size)

    def _from_main(self, pinned: Container[Hashable]) -> Hashable | None:
        """The oldest unused one; each that was used pays one use for another round."""
        uses, line = self._uses, self._main_line
        for _ in range((MOST_USES + 1) * len(self._main)):
            key = line.order.popleft()
            if key in line.voids:
                key = line.past_voids(key)
            if not (pinned and key in pinned):
                left = uses[key]
                if not left:
                    line.order.appendleft(key)
                    return key
                uses[key] = left - 1
            line.order.append(key)
        return None
