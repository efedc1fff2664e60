"""A queue that keys may leave from the middle."""

from collections import deque
from collections.abc import Container, Hashable


class LazyQueue:
    """First come, first to go. A key that leaves from the middle leaves a void place, dropped when its turn comes.

    An `OrderedDict` can do as much, but keeps a linked list for it, which costs twice a deque and a dict. Where each
    step counts, `order` is used directly: `append` to it, or `popleft` and then `past_voids` if the key is in `voids`.
    """

    __slots__ = ("num_void", "order", "voids")

    def __init__(self) -> None:
        self.order: deque[Hashable] = deque()
        self.voids: dict[Hashable, int] = {}  # key -> how many of its places are void: its oldest ones
        self.num_void = 0

    def __len__(self) -> int:
        return len(self.order) - self.num_void

    def leave(self, key: Hashable) -> None:
        """`key`, which is here, goes."""
        order, voids = self.order, self.voids
        if order[0] == key and key not in voids:
            order.popleft()
            return
        voids[key] = voids.get(key, 0) + 1
        self.num_void += 1
        if 2 * self.num_void > len(order):  # sweep: at most as many void places as keys, and O(1) per leaving
            for _ in range(len(order)):
                place = order.popleft()
                if not self._was_void(place):
                    order.append(place)

    def past_voids(self, key: Hashable) -> Hashable:
        """The oldest key, taken out, given what `popleft` returned; the queue must not be empty."""
        while self._was_void(key):
            key = self.order.popleft()
        return key

    def first(self, unwanted: Container[Hashable] = ()) -> Hashable | None:
        """The oldest key that is not in `unwanted`; it stays."""
        order, passed, found = self.order, [], None
        for _ in range(len(self)):
            key = self.past_voids(order.popleft())
            passed.append(key)
            if key not in unwanted:
                found = key
                break
        order.extendleft(reversed(passed))  # without the void places between them, which no later call has to pass
        return found

    def _was_void(self, key: Hashable) -> bool:
        """Whether the place of `key` that was just taken out was void."""
        left = self.voids.get(key)
        if left is None:
            return False
        self.num_void -= 1
        if left == 1:
            del self.voids[key]
        else:
            self.voids[key] = left - 1
        return True
