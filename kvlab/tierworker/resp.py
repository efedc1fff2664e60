"""A cache server's tiers in Redis' protocol (RESP2), for other hosts: kvlab's ``redis://`` store or any Redis client.

https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import hmac
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Self, TypeAlias

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import aligned
from kvlab.stores import Store
from kvlab.stores.base import MAX_KEY_BYTES, Buffer, buffers

logger = logging.getLogger("kvlab.serve")
Reply: TypeAlias = "bytes | list[Buffer]"

MAX_ARGUMENTS = 1 << 17
MAX_COMMAND_BYTES = 32 << 20  # of all arguments but a value
MAX_LINE = 64
MAX_CONNECTIONS = 1024
SILENCE_S = 60.0  # in the middle of a command, or of an answer that is not taken
STRANGER_S = 20.0  # for a command of a client that has not given the password
ACCEPT_AGAIN_S = 0.2
SLOWEST_BYTES_PER_S = 4 << 20
SENT_AT_ONCE = 1 << 20
LEAST_BUDGET, MOST_BUDGET = 256 << 20, 4 << 30
SCANNED = 1000  # keys of one answer at most
KEPT_SCANS = 64
OK, NIL = b"+OK\r\n", b"$-1\r\n"


class ClosedError(Exception):
    """The client is gone, or sends what is no command."""


class RespServer:
    """Answers at `address` (host:port) while the context runs. ConfigError where it cannot listen, or where others than
    this host could ask without a password."""

    def __init__(self, store: Store, address: str, *, password: str = "") -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError(f"--tcp must be HOST:PORT, got {address!r}")
        self.store = store
        self._password = password.encode()
        self._num_connections = 0
        self._lock = threading.Lock()
        try:
            family, _, _, _, place = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            if not password and not _is_loopback(str(place[0])):
                raise ConfigError(
                    f"--tcp {address} can be reached from other hosts and has no password; give --password-file FILE"
                )
            self._socket = socket.create_server(place[:2], family=family, backlog=128)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(f"cannot listen at {address!r}: {error}") from error
        self._is_closed = False
        self._budget = Budget(min(max(2 * store.max_bytes, LEAST_BUDGET), MOST_BUDGET))
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="kvlab-resp", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        self._socket.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                sock, _ = self._socket.accept()
            except OSError:  # closed; or without a free file descriptor, which another client gives back
                time.sleep(ACCEPT_AGAIN_S)
                continue
            with self._lock:
                is_full = self._num_connections >= MAX_CONNECTIONS
                self._num_connections += not is_full
            if is_full:
                sock.close()
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="kvlab-resp", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be started
                self._left(sock)
                time.sleep(ACCEPT_AGAIN_S)

    def _left(self, sock: socket.socket) -> None:
        sock.close()
        with self._lock:
            self._num_connections -= 1

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Connection(sock, self.store, self._password, self._budget).run()
        except (ClosedError, OSError) as error:
            logger.debug("kvlab serve: a client is gone: %s", error)
        except Exception:
            logger.exception("kvlab serve: a client's command failed")
        finally:
            self._left(sock)


class Budget:
    """Bytes of values that all connections together hold on their way."""

    def __init__(self, max_bytes: int) -> None:
        self._left = self.max_bytes = max_bytes
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> None:
        """Wait for so much; ClosedError where it does not come."""
        with self._changed:
            if num_bytes > self.max_bytes or not self._changed.wait_for(lambda: self._left >= num_bytes, SILENCE_S):
                raise ClosedError("values on their way take all the memory that there is for them")
            self._left -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._left += num_bytes
            self._changed.notify_all()


class Connection:
    """One client. `password`: empty for none."""

    def __init__(self, sock: socket.socket, store: Store, password: bytes, budget: Budget) -> None:
        self._sock = sock
        self._budget = budget
        self._held = 0  # of the budget
        self._store = store
        self._password = password
        self._is_known = not password
        self._received = bytearray()
        self._scans: dict[int, Iterator[str]] = {}
        self._commands: dict[bytes, tuple[Callable[..., Reply], int, int]] = {  # least and most arguments
            b"PING": (lambda *text: _bulk(text[0]) if text else b"+PONG\r\n", 0, 1),
            b"AUTH": (self._auth, 1, 2), b"SELECT": (self._select, 1, 1), b"ECHO": (_bulk, 1, 1),
            b"GET": (self._get, 1, 1), b"GETRANGE": (self._get_range, 3, 3), b"STRLEN": (self._length, 1, 1),
            b"SET": (self._set, 2, 4), b"EXISTS": (self._exists, 1, MAX_ARGUMENTS),
            b"DEL": (self._delete, 1, MAX_ARGUMENTS), b"UNLINK": (self._delete, 1, MAX_ARGUMENTS),
            b"TOUCH": (self._touch, 1, MAX_ARGUMENTS),
            b"TYPE": (self._type, 1, 1), b"SCAN": (self._scan, 1, 7), b"DBSIZE": (self._size, 0, 0),
            b"INFO": (self._info, 0, 1),
        }  # fmt: skip

    def run(self) -> None:
        try:
            while True:
                self._sock.settimeout(None if self._is_known else STRANGER_S)
                command = self._command()
                self._hold(self._needs(command))
                reply = self._answer(command)
                del command
                for piece in [reply] if isinstance(reply, bytes) else reply:
                    self._send(piece)
                del reply
                self._hold(0)
        finally:
            self._hold(0)

    def _hold(self, num_bytes: int) -> None:
        """So much more of the budget; 0 gives all of it back."""
        if num_bytes:
            self._budget.take(num_bytes)
            self._held += num_bytes
        elif self._held:
            self._budget.give_back(self._held)
            self._held = 0

    def _needs(self, command: Sequence[Buffer]) -> int:
        """Bytes of a value that the answer holds, for as long as the client does not take it."""
        is_read = self._is_known and len(command) > 1 and bytes(command[0]).upper() in (b"GET", b"GETRANGE")
        return (self._store.size_of(_text(command[1])) or 0) if is_read else 0

    def _send(self, piece: Buffer) -> None:
        """Within the time that a slow network takes for so much."""
        view = memoryview(piece).cast("B")
        end = time.monotonic() + SILENCE_S + view.nbytes / SLOWEST_BYTES_PER_S
        while view.nbytes:
            left = end - time.monotonic()
            if left <= 0:
                raise ClosedError("it takes no answer")
            self._sock.settimeout(min(left, SILENCE_S))
            view = view[self._sock.send(view[:SENT_AT_ONCE]) :]

    # ---- commands

    def _answer(self, command: Sequence[Buffer]) -> Reply:
        name = bytes(command[0]).upper()
        if name == b"QUIT":
            self._sock.sendall(OK)
            raise ClosedError("it says goodbye")
        if not self._is_known and name not in (b"AUTH", b"PING"):
            return b"-NOAUTH Authentication required.\r\n"
        run, least, most = self._commands.get(name, (None, 0, 0))
        if run is None:
            return b"-ERR unknown command\r\n"
        if not least <= len(command) - 1 <= most:
            return b"-ERR wrong number of arguments\r\n"
        try:
            return run(*command[1:])
        except StoreError as error:
            logger.warning("kvlab serve: %s failed: %s", name.decode(), error)
            return b"-ERR the tier failed\r\n"

    def _auth(self, *given: Buffer) -> Reply:
        self._is_known = not self._password or hmac.compare_digest(bytes(given[-1]), self._password)
        if self._is_known:
            return OK
        time.sleep(0.5)
        return b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"

    def _select(self, number: Buffer) -> Reply:
        return OK if bytes(number) == b"0" else b"-ERR DB index is out of range\r\n"

    def _get(self, key: Buffer) -> Reply:
        value = self._store.get(_text(key))
        return NIL if value is None else [b"$%d\r\n" % memoryview(value).nbytes, value, b"\r\n"]

    def _get_range(self, key: Buffer, start: Buffer, end: Buffer) -> Reply:
        first, last = _int(start), _int(end)
        if first is None or last is None:
            return b"-ERR value is not an integer or out of range\r\n"
        value = self._store.get_head(_text(key), last + 1) if last >= 0 else self._store.get(_text(key))
        if value is None:
            return _bulk(b"")
        view = memoryview(value).cast("B")
        last = last if last >= 0 else view.nbytes + last
        return _bulk(view[max(first if first >= 0 else view.nbytes + first, 0) : last + 1])

    def _length(self, key: Buffer) -> Reply:
        return b":%d\r\n" % (self._store.size_of(_text(key)) or 0)

    def _set(self, key: Buffer, value: Buffer, *options: Buffer) -> Reply:
        if options and bytes(options[0]).upper() not in (b"PX", b"EX", b"KEEPTTL"):
            return b"-ERR syntax error\r\n"
        if self._store.put(_text(key), value):  # what a client wants to expire leaves when room is needed
            return OK
        return b"-OOM command not allowed: the value does not fit the server's tiers\r\n"

    def _exists(self, *keys: Buffer) -> Reply:
        return b":%d\r\n" % sum(self._store.contains_many([_text(key) for key in keys]))

    def _delete(self, *keys: Buffer) -> Reply:
        return b":%d\r\n" % sum(self._store.delete(_text(key)) for key in keys)

    def _touch(self, *keys: Buffer) -> Reply:
        names = [_text(key) for key in keys]
        self._store.touch(names)
        return b":%d\r\n" % sum(self._store.contains_many(names))

    def _type(self, key: Buffer) -> Reply:
        return b"+string\r\n" if self._store.contains(_text(key)) else b"+none\r\n"

    def _scan(self, cursor: Buffer, *options: Buffer) -> Reply:
        """``MATCH PREFIX*`` is understood, other patterns are not."""
        number, prefix = _int(cursor), ""
        for name, value in zip(options[::2], options[1::2], strict=False):
            if bytes(name).upper() == b"MATCH":
                pattern = _text(value).replace("\\\\", "")
                if not pattern.endswith("*") or any(sign in pattern[:-1] for sign in "*?["):
                    return b"-ERR only patterns like PREFIX* are understood\r\n"
                prefix = pattern[:-1]
        keys = self._store.keys() if number == 0 else self._scans.pop(number or 0, None)
        if keys is None:
            return b"-ERR invalid cursor: its scan was dropped for later ones\r\n"
        taken = list(islice(keys, SCANNED))
        following = 0
        if len(taken) == SCANNED:
            if len(self._scans) >= KEPT_SCANS:
                del self._scans[min(self._scans)]  # the oldest, whose next question is answered with an error
            following = max(self._scans, default=0) + 1
            self._scans[following] = keys
        shown = [_bulk(key.encode("utf-8", "surrogateescape")) for key in taken if key.startswith(prefix)]
        return b"*2\r\n%b*%d\r\n%b" % (_bulk(b"%d" % following), len(shown), b"".join(shown))

    def _size(self) -> Reply:
        return b":%d\r\n" % len(list(self._store.keys()))

    def _info(self, section: Buffer = b"") -> Reply:
        used, most = self._store.used_bytes, self._store.max_bytes
        lines = [
            "# Server", "redis_version:7.0.0", "server_name:kvlab", "# Memory", f"used_memory:{used}",
            f"maxmemory:{most}", "maxmemory_policy:allkeys-lru", "# Replication", "role:master", "",
        ]  # fmt: skip
        return _bulk("\r\n".join(lines).encode())

    # ---- the wire

    def _command(self) -> list[Buffer]:
        """The next command's words."""
        count = self._number(b"*", MAX_ARGUMENTS)
        self._sock.settimeout(SILENCE_S)
        if count < 1:
            raise ClosedError("an empty command")
        most = MAX_COMMAND_BYTES if self._is_known else 4 * MAX_KEY_BYTES
        words: list[Buffer] = []
        for at in range(count):
            is_value = at == 2 and self._is_known and bytes(words[0]).upper() == b"SET"
            length = self._number(b"$", min(self._store.max_bytes, 1 << 40) if is_value else most)
            if not is_value:
                most -= length + 8
                if most < 0:
                    raise ClosedError("a command is too long")
            words.append(self._bytes(length))
            if self._bytes(2) != b"\r\n":
                raise ClosedError("a word without its end")
        return words

    def _number(self, sign: bytes, most: int) -> int:
        while (end := self._received.find(b"\r\n")) < 0:
            if len(self._received) > MAX_LINE:
                raise ClosedError("a line is too long")
            self._more()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        if line[:1] != sign or not line[1:].isdigit() or len(line) > 16 or int(line[1:]) > most:
            raise ClosedError("a length is none, or too large")
        return int(line[1:])

    def _bytes(self, length: int) -> Buffer:
        """So many bytes: large ones straight into memory of their own."""
        if length <= 1 << 16:
            while len(self._received) < length:
                self._more()
            taken = bytes(self._received[:length])
            del self._received[:length]
            return taken
        self._hold(length)
        room = aligned(length)[:length]
        got = min(len(self._received), length)
        room[:got] = self._received[:got]
        del self._received[:got]
        end = time.monotonic() + SILENCE_S + length / SLOWEST_BYTES_PER_S
        while got < length:
            received = self._sock.recv_into(room[got:])
            if not received or time.monotonic() > end:
                raise ClosedError("it ended in the middle, or sends too slowly")
            got += received
        return room

    def _more(self) -> None:
        piece = self._sock.recv(1 << 16)
        if not piece:
            raise ClosedError("it ended")
        self._received += piece


def _bulk(value: Buffer) -> bytes:
    view = b"".join(buffers(value))
    return b"$%d\r\n%b\r\n" % (len(view), view)


def _text(key: Buffer) -> str:
    return bytes(key).decode("utf-8", "surrogateescape")


def _int(text: Buffer) -> int | None:
    digits = bytes(text)
    return int(digits) if digits.removeprefix(b"-").isdigit() and len(digits) < 16 else None


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
