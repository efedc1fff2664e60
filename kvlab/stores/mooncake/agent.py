"""The process that has Mooncake's library: `python -m kvlab.stores.mooncake.agent`, started by the store.

The library takes no timeout, waits for a dead master for seconds and at first for 90, and hangs in a forked process.
Here a late call does no harm: it writes to memory that the store has let go of. The process ends with its input.

Each connection begins with a file of shared memory. A request is a head and a name, its value in that memory.
"""

import mmap
import os
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from kvlab.hostmemory import address
from kvlab.stores.wire import connected

REQUEST = struct.Struct("<BIQd")  # what, bytes of the name or names, bytes of the value or of room for it, seconds
REPLY = struct.Struct("<iQ")  # a code of the library, and bytes: of the value, or of what follows
PUT, GET, SIZE, EXIST, REMOVE = range(5)
NO_ROOM, TOO_LONG = -200, -600
TRIES = 8  # an object may grow between the look and the read
REFUSED, NO_CLIENT, TOO_SMALL = -1, -2, -3  # the agent's own codes
LOCAL_BYTES = 16 << 20  # for the library's own small things
SETUP_WAIT_S = 3.0  # for a connection to the master, before the library may wait for it
ROOM_WAIT_S = 0.05  # between puts while the master makes room


class Agent:
    def __init__(self, module: Any, host: str, port: int, metadata: str, protocol: str, device: str) -> None:
        self._module = module
        self._master = (host, port)
        self._settings = (metadata, protocol, device)
        self._client: Any = None
        self._lock = threading.Lock()

    def client(self) -> Any:
        """Made with the first request that finds the master."""
        with self._lock:
            if self._client is None:
                sock = connected(self._master, None, time.monotonic() + SETUP_WAIT_S)
                here = sock.getsockname()[0]
                sock.close()
                client = self._module.MooncakeDistributedStore()
                metadata, protocol, device = self._settings
                master = f"{self._master[0]}:{self._master[1]}"
                code = client.setup(here, metadata, 0, LOCAL_BYTES, protocol, device, master)
                if code:
                    raise RuntimeError(code)
                self._client = client
            return self._client

    def serve(self, sock: socket.socket) -> None:
        memory = Memory(socket.recv_fds(sock, 1, 1)[1][0])
        with suppress(OSError, struct.error), sock, sock.makefile("rb") as stream:
            while head := stream.read(REQUEST.size):
                what, num_name, size, patience_s = REQUEST.unpack(head)
                name = stream.read(num_name).decode()
                try:
                    code, length, rest = self._answer(what, name, size, time.monotonic() + patience_s, memory)
                except ConnectionRefusedError:
                    code, length, rest = REFUSED, 0, b""
                except (OSError, RuntimeError):
                    code, length, rest = NO_CLIENT, 0, b""
                sock.sendall(REPLY.pack(code, length) + rest)
        memory.close(self._client)

    def _answer(self, what: int, name: str, size: int, end: float, memory: "Memory") -> tuple[int, int, bytes]:
        client = self.client()
        if what == EXIST:
            codes = client.batch_is_exist(name.split("\n"))
            return 0, len(codes), bytes(code == 1 if code >= 0 else 2 for code in codes)
        if what == REMOVE:  # forced: a look at an object gives a lease of it for seconds
            return client.remove(name, True), 0, b""
        if what == PUT:
            place = memory.place(client, size)
            while True:
                code = client.upsert_from(name, place, size)
                if code != NO_ROOM or time.monotonic() + ROOM_WAIT_S > end:
                    return code, 0, b""
                time.sleep(ROOM_WAIT_S)  # what is old leaves in the background
        for _ in range(TRIES):
            length = client.get_size(name)
            if length < 0 or what == SIZE:
                return min(length, 0), max(length, 0), b""
            if length > size:
                return TOO_SMALL, length, b""
            got = client.get_into(name, memory.place(client, size), size)
            if got != TOO_LONG:
                break
        return min(got, 0), max(got, 0), b""


class Memory:
    """The shared file of one connection, which the store makes as long as it needs."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._mapped: mmap.mmap | None = None
        self._place = 0

    def place(self, client: Any, size: int) -> int:
        """Where it lies, known to the library."""
        if self._mapped is None or len(self._mapped) < size:
            self._let_go(client)
            self._mapped = mmap.mmap(self._file, os.fstat(self._file).st_size)
            self._place = address(memoryview(self._mapped))
            client.register_buffer(self._place, len(self._mapped))
        return self._place

    def close(self, client: Any) -> None:
        self._let_go(client)
        os.close(self._file)

    def _let_go(self, client: Any) -> None:
        if self._mapped is not None:
            client.unregister_buffer(self._place)
            self._mapped = None  # unmapped when nothing refers to it


def main() -> None:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "3")
    from mooncake import store

    listener = socket.socket(fileno=int(sys.argv[1]))
    host, port, metadata, protocol, device = sys.argv[2:]
    agent = Agent(store, host, int(port), metadata, protocol, device)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=agent.serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    os.write(1, b"ready\n")
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
