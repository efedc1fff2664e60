"""S3-FIFO: three queues that filter what is used only once."""

from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable

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
        uses, all_uses, ghosts = 0, self._uses, self._ghosts
        if key in all_uses:
            uses = min(all_uses[key] + 1, MOST_USES)
            self._chosen = None
            self.discard(key)
        all_uses[key] = uses
        if key in ghosts:
            del ghosts[key]
            self._main[key] = size
            self._main_bytes += size
        else:
            self._small[key] = size
            self._small_bytes += size

    def touch(self, key: Hashable) -> None:
        uses = self._uses.get(key)
        if uses is not None and uses < MOST_USES:
            self._uses[key] = uses + 1

    def touch_all(self, keys: Iterable[Hashable]) -> None:
        all_uses = self._uses
        for key in keys:
            uses = all_uses.get(key)
            if uses is not None and uses < MOST_USES:
                all_uses[key] = uses + 1

    def discard(self, key: Hashable) -> None:
        if self._uses.pop(key, None) is None:
            return
        size = self._small.pop(key, None)
        if size is None:
            self._main_bytes -= self._main.pop(key)
            return
        self._small_bytes -= size
        if key == self._chosen:
            ghosts = self._ghosts
            ghosts[key] = None
            if len(ghosts) > max(len(self._main), 1):
                ghosts.popitem(last=False)

    def victim(self, pinned: Container[Hashable] = ()) -> Hashable | None:
        if self._small and not pinned and self._small_is_full():  # nearly always
            key = next(iter(self._small))
            if self._uses[key] <= 1:
                self._chosen = key
                return key
        self._chosen = self._search(pinned)
        return self._chosen

    def evict(self) -> Hashable | None:
        small, main, uses, ghosts = self._small, self._main, self._uses, self._ghosts
        while small and self._small_bytes >= SMALL_SHARE * (self._small_bytes + self._main_bytes):
            # what `victim` and `discard` do, without looking the key up again and again
            key, size = small.popitem(last=False)
            self._small_bytes -= size
            if uses[key] <= 1:
                del uses[key]
                ghosts[key] = None
                if len(ghosts) > len(main) and len(ghosts) > 1:
                    ghosts.popitem(last=False)
                return key
            main[key] = size
            self._main_bytes += size
            uses[key] = 0
        return super().evict()

    def _small_is_full(self) -> bool:
        return self._small_bytes >= SMALL_SHARE * (self._small_bytes + self._main_bytes)

    def _search(self, pinned: Container[Hashable]) -> Hashable | None:
        """Whose turn it is is asked again after each move, so that asking twice gives one answer."""
        while self._small_is_full():
            key = next((key for key in self._small if not (pinned and key in pinned)), None)
            if key is None or self._uses[key] <= 1:
                return key if key is not None else self._from_main(pinned)
            self._move_on(key)
        key = self._from_main(pinned)
        if key is not None:
            return key
        for key in list(self._small):  # the main queue has nobody to give
            if not (pinned and key in pinned):
                if self._uses[key] <= 1:
                    return key
                self._move_on(key)
        return self._from_main(pinned)

    def _move_on(self, key: Hashable) -> None:
        """From the small queue to the main one."""
        size = self._small.pop(key)
        self._small_bytes -= size
        self._main[key] = size
        self._main_bytes += size
        self._uses[key] = 0

    def _from_main(self, pinned: Container[Hashable]) -> Hashable | None:
        """The oldest unused one; each that was used pays one use for another round."""
        uses, main = self._uses, self._main
        for _ in range((MOST_USES + 1) * len(main)):
            key = next(iter(main))
            if not (pinned and key in pinned):
                left = uses[key]
                if not left:
                    return key
                uses[key] = left - 1
            main.move_to_end(key)
        return None
