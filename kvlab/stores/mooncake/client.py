"""Questions to Mooncake through the process that has its library."""

import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from kvlab.errors import ConfigError, StoreError
from kvlab.stores.base import ValueTooLongError
from kvlab.stores.forks import ForkAware
from kvlab.stores.mooncake.agent import (
    EXIST,
    GET,
    NO_CLIENT,
    NO_ROOM,
    PUT,
    REFUSED,
    REMOVE,
    REPLY,
    REQUEST,
    SIZE,
    TOO_SMALL,
)
from kvlab.stores.server import AnswerError, Server
from kvlab.stores.wire import ProtocolError, Wire, connected

ABSENT = frozenset({-703, -704})  # an object in the making, and none
START_S = 60.0  # for the agent to load the library
_WORDS = {
    **{NO_ROOM: "full", -600: "bad_request", -706: "leased", -800: "transfer", -900: "disconnected"},
    **{REFUSED: "refused", NO_CLIENT: "unreachable"},
}
_NEEDS = "apt-get install libibverbs1 librdmacm1 libnuma1 libnl-3-200 libnl-route-3-200"
_PAGE = 1 << 16


class AgentConnection(Wire):
    """With memory that the agent shares. `patience_s`: how long a put may wait for room."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._file = os.memfd_create("kvlab-mooncake")
        self._memory: mmap.mmap | None = None
        socket.send_fds(sock, [b"m"], [self._file])

    def drop(self) -> None:
        super().drop()
        if self._file >= 0:
            os.close(self._file)
        self._file, self._memory = -1, None

    def room(self, size: int) -> memoryview:
        """Memory for a value of this length, up to the next request."""
        if self._memory is None or len(self._memory) < size:
            length = -(-size // _PAGE) * _PAGE or _PAGE
            os.ftruncate(self._file, length)
            self._memory = mmap.mmap(self._file, length)
        return memoryview(self._memory)[:size]

    def put(self, name: str, size: int, patience_s: float, deadline: float) -> None:
        """The value is in `room`."""
        self._ask(PUT, name, size, deadline, patience_s)

    def get(self, name: str, most: int, deadline: float) -> memoryview | None:
        """The object of at most `most` bytes, until the next request."""
        size = len(self._memory) if self._memory is not None else 0
        while True:
            code, length = self._ask(GET, name, size, deadline)
            if code in ABSENT:
                return None
            if code != TOO_SMALL:
                return self.room(length) if length <= most else None
            if length > most:
                raise ValueTooLongError(f"an object has {length} bytes; the limit is {most}")
            size = len(self.room(length))

    def size(self, name: str, deadline: float) -> int | None:
        code, length = self._ask(SIZE, name, 0, deadline)
        return None if code in ABSENT else length

    def exist(self, names: Sequence[str], deadline: float) -> list[bool]:
        _, length = self._ask(EXIST, "\n".join(names), 0, deadline)
        if length != len(names):
            raise ProtocolError("Mooncake gave not one answer for each name")
        found = self.take(length, deadline)
        if 2 in found:
            raise AnswerError("Mooncake does not say whether an object exists", reason="disconnected")
        return [answer == 1 for answer in found]

    def remove(self, name: str, deadline: float) -> bool:
        return self._ask(REMOVE, name, 0, deadline)[0] not in ABSENT

    def _ask(self, what: int, name: str, size: int, deadline: float, patience_s: float = 0.0) -> tuple[int, int]:
        raw = name.encode()
        self.send(REQUEST.pack(what, len(raw), size, patience_s) + raw, deadline)
        code, length = REPLY.unpack(self.take(REPLY.size, deadline))
        if code < 0 and code not in ABSENT and code != TOO_SMALL:
            raise AnswerError(f"Mooncake answered {code}", reason=_WORDS.get(code, "failed"))
        return code, length


class AgentServer(Server[AgentConnection]):
    def is_fatal(self, error: AnswerError) -> bool:
        return error.reason in ("disconnected", "refused", "unreachable")


class Agent(ForkAware):
    """The process, started when it is first needed and again should it end. A forked child uses its parent's as long as
    that lives."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""
        self._owner = 0
        self._lock = threading.Lock()
        self.watch_forks()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                os.close(self._process.stdin.fileno())  # or the agent would outlive the parent

    def connect(self, deadline: float) -> AgentConnection:
        with self._lock:
            if self._folder:
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    return AgentConnection(connected(f"{self._folder}/agent", None, deadline))
            try:
                self.start(max(0.0, deadline - time.monotonic()))
            except ConfigError as error:
                raise StoreError(str(error), reason="unreachable") from None
        return AgentConnection(connected(f"{self._folder}/agent", None, deadline))

    def start(self, patience_s: float = START_S) -> None:
        """ConfigError, in one line, where the library or what it needs is missing."""
        self.end()
        self._folder, self._owner = tempfile.mkdtemp(prefix="kvlab-mooncake-"), os.getpid()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self._folder}/agent")
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvlab.stores.mooncake.agent", str(listener.fileno()), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        process = self._process
        ready: list[bytes] = []
        waits = threading.Thread(target=lambda: ready.append(process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
        waits.start()
        waits.join(patience_s)
        if ready == [b"ready\n"]:
            threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
            return
        if not ready:
            self.end()
            raise ConfigError("mooncake:// cannot load Mooncake in time")
        said = process.communicate()[1].decode(errors="replace").strip().rpartition("\n")[2] if process.stderr else ""
        self.end()
        raise ConfigError(f"mooncake:// cannot load Mooncake: {said[:300]}; {_NEEDS}")

    def end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process, self._folder = None, ""


def _drain(stream: object) -> None:
    """What the library logs is not for us, and must not fill the pipe."""
    with suppress(OSError, ValueError):
        while stream.read(1 << 12):  # type: ignore[attr-defined]
            pass
