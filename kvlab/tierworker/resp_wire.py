"""The words of a client that speaks Redis' protocol, and the answers to it: within limits, a budget and a pace.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import select
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from kvlab.errors import StoreError
from kvlab.hostmemory import aligned, scratch
from kvlab.stores.base import MAX_KEY_BYTES, Buffer
from kvlab.tierworker.budget import Budget, Hold

T = TypeVar("T")

MAX_ARGUMENTS = 1 << 17
MAX_COMMAND_BYTES = 32 << 20  # of all arguments but a value
MAX_DROPPED_BYTES = 512 << 20  # of a value that is too large: Redis' own limit
MAX_LINE = 64
SILENCE_S = 60.0  # in a command, or in an answer that is not taken
CROWDED_S = 2.0  # the same, while others wait for the memory that it takes
STRANGER_S = 15.0  # from its connection on, for a client to give the password
SLOWEST_BYTES_PER_S = 4 << 20
LOOK_S = 0.5  # between looks at whether others wait
MOVED_AT_ONCE = 256 << 10
LARGE = 1 << 16  # bytes of a word that is given memory of its own, and steps in which the budget is taken
WORD_BYTES = 64  # that Python takes for a word besides its bytes


class ClosedError(Exception):
    """The client is gone, or sends what is no command."""


class ProtocolError(Exception):
    """What the client sends is no command: to be told, before it is left."""


class Wire:
    """One client's socket. `is_known`: it has given the password."""

    def __init__(self, sock: socket.socket, budget: Budget, *, is_known: bool) -> None:
        self._sock = sock
        self._hold = Hold(budget)
        self._unpaid = 0  # bytes that are here and not taken from the budget yet
        self._received = bytearray()
        self._since, self._moved = time.monotonic(), 0  # of a command or an answer
        self._until = None if is_known else time.monotonic() + STRANGER_S
        self.is_too_large = False  # the value of the last command, which was dropped

    @property
    def is_known(self) -> bool:
        return self._until is None

    def know(self) -> None:
        """It has given the password."""
        self._until = None

    # ---- in

    def command(self) -> list[Buffer]:
        """The next command's words, whose bytes are held of the budget until `done`. ClosedError or ProtocolError."""
        self.is_too_large = False
        if not self._received:
            self._await()
        self._begin()
        count = self._number(b"*", MAX_ARGUMENTS)
        if count < 1:
            raise ProtocolError("an empty command")
        most = MAX_COMMAND_BYTES if self.is_known else 4 * MAX_KEY_BYTES
        words: list[Buffer] = []
        for at in range(count):
            is_value = at == 2 and self.is_known and bytes(words[0]).upper() == b"SET"
            length = self._number(b"$", self._most_of_a_value if is_value else most)
            if not is_value:
                most -= length + 8
                if most < 0:
                    raise ProtocolError("a command is too long")
            words.append(self._word(length))
            if self._taken(2) != b"\r\n":
                raise ProtocolError("a word without its end")
        return words

    def done(self) -> None:
        """The command has been answered."""
        self._unpaid = 0
        self._hold.give_back()

    def hold(self, num_bytes: int) -> bool:
        """So much more of the budget, for an answer; False where it is more than there ever is."""
        if num_bytes > self._hold.budget.max_bytes:
            return False
        self._unpaid += num_bytes
        self._pay()
        return True

    @property
    def _most_of_a_value(self) -> int:
        return max(self._hold.budget.max_bytes, MAX_DROPPED_BYTES)

    def _number(self, sign: bytes, most: int) -> int:
        while (end := self._received.find(b"\r\n")) < 0:
            if len(self._received) > MAX_LINE:
                raise ProtocolError("a line is too long")
            self._more()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        if line[:1] != sign or not line[1:].isdigit() or len(line) > 16 or int(line[1:]) > most:
            raise ProtocolError("a length is none, or too large")
        return int(line[1:])

    def _word(self, length: int) -> Buffer:
        """So many bytes: large ones straight into memory of their own, or nowhere, where they are too large."""
        self._unpaid += WORD_BYTES
        if length <= LARGE:
            return self._taken(length)
        is_dropped = length > self._hold.budget.max_bytes
        self.is_too_large |= is_dropped
        try:
            room = scratch("dropped", MOVED_AT_ONCE) if is_dropped else aligned(length)[:length]
        except StoreError as error:
            raise ClosedError(str(error)) from error
        got = min(len(self._received), length)
        if not is_dropped:
            room[:got] = self._received[:got]
        del self._received[:got]
        while got < length:
            into = room if is_dropped else room[got:]
            into = into[: min(MOVED_AT_ONCE, length - got)]
            received = self._patiently(lambda into=into: self._sock.recv_into(into))  # type: ignore[misc]
            got += self._arrived(received, is_kept=not is_dropped)
        return b"" if is_dropped else room

    def _taken(self, length: int) -> Buffer:
        while len(self._received) < length:
            self._more()
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    def _more(self) -> None:
        piece = self._patiently(lambda: self._sock.recv(LARGE))
        self._arrived(len(piece))
        self._received += piece

    def _arrived(self, num_bytes: int, *, is_kept: bool = True) -> int:
        if not num_bytes:
            raise ClosedError("it ended")
        self._moved += num_bytes
        if is_kept:
            self._unpaid += num_bytes
            if self._unpaid >= LARGE:
                self._pay()
        return num_bytes

    def _pay(self) -> None:
        """Take from the budget what is here: a client that only announces a value takes nothing."""
        start = time.monotonic()
        if not self._hold.take(self._unpaid, SILENCE_S):
            raise ClosedError("values on their way take all the memory that there is for them")
        self._unpaid = 0
        self._since += time.monotonic() - start  # to wait for others is not to be slow

    # ---- out

    def send(self, piece: Buffer) -> None:
        """ClosedError where it is not taken."""
        self._begin()
        view = memoryview(piece).cast("B")
        while view.nbytes:
            sent = self._patiently(lambda view=view: self._sock.send(view[:MOVED_AT_ONCE]))  # type: ignore[misc]
            self._moved += sent
            view = view[sent:]

    def wait_a_little(self, seconds: float) -> None:
        """Not longer than the client is there."""
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        poller.poll(seconds * 1e3)

    # ---- the pace

    def _begin(self) -> None:
        self._since, self._moved = time.monotonic(), 0

    def _await(self) -> None:
        """The first byte of a command: a client that is known may take its time."""
        self._sock.settimeout(None if self._until is None else max(self._until - time.monotonic(), 0.001))
        try:
            piece = self._sock.recv(LARGE)
        except TimeoutError:
            raise ClosedError("it has not given the password") from None
        self._arrived(len(piece))
        self._received += piece

    def _patiently(self, move: Callable[[], T]) -> T:
        """The result of a call that waits for the client, as long as it keeps the pace: so many bytes each second, a
        while aside, which is short once others wait for what this one holds."""
        while True:
            is_in_the_way = self._hold.num_bytes > 0 and self._hold.budget.is_wanted
            end = self._since + (CROWDED_S if is_in_the_way else SILENCE_S) + self._moved / SLOWEST_BYTES_PER_S
            left = (end if self._until is None else min(end, self._until)) - time.monotonic()
            if left <= 0:
                raise ClosedError("it sends or takes too slowly")
            self._sock.settimeout(min(left, LOOK_S))
            try:
                return move()
            except TimeoutError:
                continue
