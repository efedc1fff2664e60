"""Objects that a load copies from a cache server's memory, where they lie."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kvlab.connectors.vllm.messages import LoadOp
from kvlab.connectors.vllm.worker.pending import page_tokens
from kvlab.paged.transfer import Clock, Transfer
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Fill


@dataclass(frozen=True)
class Place:
    """Where the server said that an object's slots begin, in answer to `request` of a `session`."""

    session: int
    request: int
    at: int


class Lent:
    """What is lent for loads under way, by generation. The server keeps it where it is until it is given back or the
    session ends, so a copy holds the object only if the session has not ended when the copy has."""

    def __init__(self, tiers: TierClient | None, transfer: Transfer, *, is_wanted: bool) -> None:
        self._tiers = tiers
        self._transfer = transfer
        self._places: dict[int, Place] = {}
        lent = tiers.lent if tiers is not None else None
        self._is_mapped = is_wanted and lent is not None and transfer.map_lent(lent.bytes)
        self._num_bytes = lent.bytes.nbytes if lent is not None else 0
        self._block_bytes = transfer.arena[0].nbytes

    def __contains__(self, op: LoadOp) -> bool:
        return op.generation in self._places

    @property
    def may_ask(self) -> bool:
        """Whether an object may be asked for where it lies."""
        return self._is_mapped and self._tiers is not None and self._tiers.lends

    def take(self, op: LoadOp, fill: Fill, at: object) -> bool:
        """The answer to `fill` says that the object begins at this byte. False if that is no place for it."""
        most = self._num_bytes - len(op.slots) * self._block_bytes
        if not (isinstance(at, int) and not isinstance(at, bool) and fill.lend and 0 <= at <= most):
            return False
        assert self._tiers is not None
        self._places[op.generation] = Place(self._tiers.session, fill.id, at)
        return True

    def has_kept(self, op: LoadOp) -> bool:
        """Whether the object has been where it was said to be until now."""
        assert self._tiers is not None
        return self._tiers.has_kept(self._places[op.generation].session)

    def copies(self, ops: Sequence[LoadOp], fence: Any) -> Iterator[Clock]:
        """Begin the copies of these objects to their pages, in this order, from slots or from where they are lent."""
        for is_lent, group in groupby([op for op in ops if op.picked], self.__contains__):
            some = list(group)
            pages = [block for op in some for block in op.block_ids]
            tokens = page_tokens(self._transfer.coded_tokens, some)
            if is_lent:
                places = [place for op in some for place in self._places_of(op)]
                yield self._transfer.load_lent(places, pages, fence, **tokens)
            else:
                slots = [slot for op in some for slot in op.picked]
                yield self._transfer.load_aside(slots, pages, fence, **tokens)

    def _places_of(self, op: LoadOp) -> list[int]:
        """Where the blocks begin that this load reads."""
        numbers = {slot: number for number, slot in enumerate(op.slots)}
        at = self._places[op.generation].at
        return [at + numbers[slot] * self._block_bytes for slot in op.picked]

    def give_back(self, ops: Sequence[LoadOp]) -> None:
        """No copy reads these any more."""
        ended: dict[int, list[int]] = defaultdict(list)
        for op in ops:
            if (place := self._places.pop(op.generation, None)) is not None:
                ended[place.session].append(place.request)
        for session, requests in ended.items():
            assert self._tiers is not None
            self._tiers.give_back(session, requests)
