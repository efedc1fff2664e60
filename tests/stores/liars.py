"""A server that speaks Redis' protocol as it likes: honest by default, and per command what a test gives it."""

import contextlib
import socket
import threading

WAIT = b""  # an answer that never comes


def bulk(value):
    return b"$%d\r\n%s\r\n" % (len(value), value)


def hang_up(listener, sockets):
    """Close a server's sockets; threads that wait on one end."""
    listener.close()
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


class Listening:
    """A server whose `serve(sock)` talks to each client in a thread of its own. `connections` counts."""

    def __init__(self):
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.closed = threading.Event()
        # Its connections inherit it: replies to several commands at once would wait 40 ms for each other.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed.set()
        hang_up(self._listener, self._sockets)

    def _accept(self):
        with contextlib.suppress(OSError):
            while not self.closed.is_set():
                sock, _ = self._listener.accept()
                self.connections += 1
                self._sockets.append(sock)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()


class Liar(Listening):
    """`lies` are replies by command, as bytes or as `lie(liar, sock, args)` that gives them, or None to hang up.

    What is asked is kept in `asked`; `connections` counts.
    """

    def __init__(self, lies=None):
        self.lies = dict(lies or {})
        self.data = {b"kvlab:a": b"value of a", b"kvlab:b": b"value of b"}
        self.asked = []
        super().__init__()

    def serve(self, sock):
        with contextlib.suppress(OSError, ValueError, IndexError), sock, sock.makefile("rb") as stream:
            while line := stream.readline():
                args = []
                for _ in range(int(line[1:])):
                    args.append(stream.read(int(stream.readline()[1:])))
                    stream.read(2)
                self.asked.append(args)
                lie = self.lies.get(args[0].upper())
                answer = lie(self, sock, args) if callable(lie) else self.honest(args) if lie is None else lie
                if answer is None:
                    return
                sock.sendall(answer)

    def honest(self, args):
        command, *rest = args[0].upper(), *args[1:]
        if command == b"SET":
            self.data[rest[0]] = rest[1]
        value = self.data.get(rest[0]) if rest else None
        here = f"127.0.0.1 {self.port}".encode().split()
        return {
            b"GET": lambda: b"$-1\r\n" if value is None else bulk(value),
            b"EXISTS": lambda: b":%d\r\n" % (value is not None),
            b"TOUCH": lambda: b":%d\r\n" % (value is not None),
            b"STRLEN": lambda: b":%d\r\n" % len(value or b""),
            b"EVAL": lambda: b":%d\r\n" % (self.data.pop(rest[2], None) is not None),
            b"GETRANGE": lambda: bulk((value or b"")[int(rest[1]) : int(rest[2]) + 1]),
            b"UNLINK": lambda: b":%d\r\n" % (self.data.pop(rest[0], None) is not None),
            b"INFO": lambda: bulk(b"used_memory:1\r\nmaxmemory:1000000\r\n"),
            b"CONFIG": lambda: b"*2\r\n" + bulk(b"proto-max-bulk-len") + bulk(b"536870912"),
            b"SCAN": lambda: b"*2\r\n" + bulk(b"0") + b"*%d\r\n" % len(self.data) + b"".join(map(bulk, self.data)),
            b"SENTINEL": lambda: b"*2\r\n" + bulk(here[0]) + bulk(here[1]),
            b"CLUSTER": lambda: b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n" + bulk(here[0]) + b":%d\r\n" % self.port,
        }.get(command, lambda: b"+OK\r\n")()
