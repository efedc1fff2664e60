"""Saves whose blocks are still being looked at: a codec keeps no NaN and no infinity, and on a GPU that is known only
once the save has ended."""

from collections import deque
from collections.abc import Sequence

from kvlab.connectors.vllm.messages import SaveOp
from kvlab.paged.transfer import Transfer


class Saved:
    """The saves given to a transfer, until it is known that slots hold their blocks. Only then is an object written to
    a tier, or loaded."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._awaited: deque[Sequence[SaveOp]] = deque()  # as many ops as there are saves

    def __bool__(self) -> bool:
        return bool(self._awaited)

    def add(self, ops: Sequence[SaveOp]) -> None:
        """What the transfer's latest save is of."""
        self._awaited.append(ops)

    def known(self, wait_for: Sequence[int] | None = ()) -> tuple[set[int], list[SaveOp], list[SaveOp]]:
        """Of saves that are known by now, and of those to the slots `wait_for` (None: of all): slots that hold no
        block, operations whose slots all do, and the others."""
        unfit = self._transfer.take_unfit(wait_for)
        whole: list[SaveOp] = []
        broken: list[SaveOp] = []
        while len(self._awaited) > self._transfer.num_unheard:
            for op in self._awaited.popleft():
                (whole if unfit.isdisjoint(op.slots) else broken).append(op)
        return unfit, whole, broken
