"""What a client of Redis may ask of a cache server's tiers."""

import hmac
import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeAlias

from kvlab.errors import StoreError
from kvlab.stores import Store
from kvlab.stores.base import Buffer, buffers
from kvlab.tierworker.resp_wire import MAX_ARGUMENTS, ClosedError, ProtocolError, Wire
from kvlab.tierworker.scans import Scans

logger = logging.getLogger("kvlab.serve")
Reply: TypeAlias = "bytes | list[Buffer]"

SCANNED = 1000  # keys of one answer at most
WRONG_PASSWORD_S = 0.5
OK, NIL, NULL = b"+OK\r\n", b"$-1\r\n", b"_\r\n"  # the last is what RESP3 has for NIL
SYNTAX = b"-ERR syntax error\r\n"
NO_NUMBER = b"-ERR value is not an integer or out of range\r\n"
NO_PASSWORD = b"-NOAUTH Authentication required.\r\n"
NO_ROOM = b"-OOM command not allowed: the value does not fit the server's tiers\r\n"
NO_WAY = b"-ERR the value is larger than what the server has on its way\r\n"
EXPIRIES = (b"EX", b"PX", b"EXAT", b"PXAT")


class Connection:
    """One client. `password`: empty for none; `admit` says whether there is a place for one that has given it."""

    def __init__(
        self, wire: Wire, store: Store, scans: Scans, password: bytes, *, admit: Callable[[], bool] = lambda: True
    ) -> None:
        self.wire = wire
        self._store = store
        self._scans = scans
        self._password = password
        self._admit = admit
        self._protocol = 2
        self._cursor = 0  # of the latest scan
        self._commands: dict[bytes, tuple[Callable[..., Reply], int, int]] = {  # least and most arguments
            b"PING": (lambda *text: _bulk(text[0]) if text else b"+PONG\r\n", 0, 1),
            b"AUTH": (self._auth, 1, 2), b"HELLO": (self._hello, 0, 6), b"CLIENT": (self._client, 1, MAX_ARGUMENTS),
            b"SELECT": (self._select, 1, 1), b"ECHO": (_bulk, 1, 1),
            b"GET": (self._get, 1, 1), b"GETRANGE": (self._get_range, 3, 3), b"STRLEN": (self._length, 1, 1),
            b"SET": (self._set, 2, 8), b"EXISTS": (self._exists, 1, MAX_ARGUMENTS),
            b"DEL": (self._delete, 1, MAX_ARGUMENTS), b"UNLINK": (self._delete, 1, MAX_ARGUMENTS),
            b"TOUCH": (self._touch, 1, MAX_ARGUMENTS),
            b"TYPE": (self._type, 1, 1), b"SCAN": (self._scan, 1, 7), b"DBSIZE": (self._size, 0, 0),
            b"INFO": (self._info, 0, 1),
        }  # fmt: skip

    def run(self) -> None:
        """Until the client is gone: ClosedError."""
        try:
            while True:
                reply = self._answer(self.wire.command())
                for piece in [reply] if isinstance(reply, bytes) else reply:
                    self.wire.send(piece)
                del reply
                self.wire.done()
        except ProtocolError as error:
            if self.wire.is_known:
                self.wire.send(b"-ERR Protocol error: %b\r\n" % str(error).encode())
            raise ClosedError(str(error)) from error
        finally:
            self.wire.done()

    def _answer(self, command: Sequence[Buffer]) -> Reply:
        name = bytes(command[0]).upper()
        if name == b"QUIT":
            self.wire.send(OK)
            raise ClosedError("it says goodbye")
        if not self.wire.is_known and name not in (b"AUTH", b"HELLO", b"PING"):
            return NO_PASSWORD
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

    # ---- who asks

    def _auth(self, *given: Buffer) -> Reply:
        if self._password and not hmac.compare_digest(bytes(given[-1]), self._password):
            self.wire.wait_a_little(WRONG_PASSWORD_S)
            return b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
        if not self.wire.is_known:
            if not self._admit():
                self.wire.send(b"-ERR max number of clients reached\r\n")
                raise ClosedError("there is no place for it")
            self.wire.know()
        return OK

    def _hello(self, version: Buffer = b"", *options: Buffer) -> Reply:
        """``HELLO [VERSION [AUTH USER PASSWORD] [SETNAME NAME]]``."""
        if version and bytes(version) not in (b"2", b"3"):
            return b"-NOPROTO unsupported protocol version\r\n"
        left = list(options)
        while left:
            name = bytes(left.pop(0)).upper()
            if name == b"AUTH" and len(left) >= 2:
                if (reply := self._auth(left.pop(0), left.pop(0))) != OK:
                    return reply
            elif name == b"SETNAME" and left:
                left.pop(0)
            else:
                return SYNTAX
        if not self.wire.is_known:
            return NO_PASSWORD
        self._protocol = int(bytes(version)) if version else self._protocol
        facts = {
            b"server": _bulk(b"redis"), b"version": _bulk(b"7.0.0"), b"proto": b":%d\r\n" % self._protocol,
            b"id": b":1\r\n", b"mode": _bulk(b"standalone"), b"role": _bulk(b"master"), b"modules": b"*0\r\n",
        }  # fmt: skip
        begin = b"%%%d\r\n" % len(facts) if self._protocol == 3 else b"*%d\r\n" % (2 * len(facts))
        return begin + b"".join(_bulk(name) + value for name, value in facts.items())

    def _client(self, what: Buffer, *_: Buffer) -> Reply:
        """Names that clients give themselves at their start."""
        return OK if bytes(what).upper() in (b"SETINFO", b"SETNAME") else b"-ERR unknown subcommand\r\n"

    def _select(self, number: Buffer) -> Reply:
        return OK if bytes(number) == b"0" else b"-ERR DB index is out of range\r\n"

    # ---- values

    def _get(self, key: Buffer) -> Reply:
        name = _text(key)
        if not self.wire.hold(self._store.size_of(name) or 0):
            return NO_WAY
        value = self._store.get(name)
        if value is None:
            return NIL if self._protocol == 2 else NULL
        return [b"$%d\r\n" % memoryview(value).nbytes, value, b"\r\n"]

    def _get_range(self, key: Buffer, start: Buffer, end: Buffer) -> Reply:
        first, last = _int(start), _int(end)
        if first is None or last is None:
            return NO_NUMBER
        name = _text(key)
        size = self._store.size_of(name) or 0
        is_backwards = first < 0 and last < 0 and first > last
        first, last = (max(at + size, 0) if at < 0 else at for at in (first, last))
        last = min(last, size - 1)
        if is_backwards or first > last:
            return _bulk(b"")
        if not self.wire.hold(last + 1):
            return NO_WAY
        value = self._store.get_head(name, last + 1)
        return _bulk(b"" if value is None else memoryview(value).cast("B")[first : last + 1])

    def _length(self, key: Buffer) -> Reply:
        return b":%d\r\n" % (self._store.size_of(_text(key)) or 0)

    def _set(self, key: Buffer, value: Buffer, *options: Buffer) -> Reply:
        """What a client wants to expire leaves when room is needed. NX and XX are refused: they are for locks, and one
        that does not expire is none."""
        if (wrong := _wrong_expiry([bytes(option) for option in options])) is not None:
            return wrong
        if self.wire.is_too_large or not self._store.put(_text(key), value):
            return NO_ROOM
        return OK

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

    # ---- all that there is

    def _scan(self, cursor: Buffer, *options: Buffer) -> Reply:
        """``MATCH PREFIX*`` is understood, other patterns are not."""
        number, prefix = _int(cursor), ""
        for name, value in zip(options[::2], options[1::2], strict=False):
            if bytes(name).upper() == b"MATCH":
                pattern = _text(value).replace("\\\\", "")
                if not pattern.endswith("*") or any(sign in pattern[:-1] for sign in "*?["):
                    return b"-ERR only patterns like PREFIX* are understood\r\n"
                prefix = pattern[:-1]
        if number is None or number < 0:
            return b"-ERR invalid cursor\r\n"
        keys = self._store.keys() if number == 0 else self._scans.take(self, number)
        if keys is None:
            return b"-ERR invalid cursor: its scan was dropped for later ones\r\n"
        taken = list(islice(keys, SCANNED))
        following = 0
        if len(taken) == SCANNED:
            following = self._cursor = self._cursor + 1
            self._scans.put(self, following, keys)
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


def _wrong_expiry(options: Sequence[bytes]) -> bytes | None:
    """The error that Redis answers to these options of SET, of which one or none is understood."""
    if not options or (len(options) == 1 and options[0].upper() == b"KEEPTTL"):
        return None
    if len(options) != 2 or options[0].upper() not in EXPIRIES:
        return SYNTAX
    expiry = _int(options[1])
    if expiry is None:
        return NO_NUMBER
    return None if expiry > 0 else b"-ERR invalid expire time in 'set' command\r\n"


def _bulk(value: Buffer) -> bytes:
    view = b"".join(buffers(value))
    return b"$%d\r\n%b\r\n" % (len(view), view)


def _text(key: Buffer) -> str:
    return bytes(key).decode("utf-8", "surrogateescape")


def _int(text: Buffer) -> int | None:
    digits = bytes(text)
    return int(digits) if digits.removeprefix(b"-").isdigit() and len(digits) < 16 else None
