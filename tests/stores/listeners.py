"""Servers of tests: each connection in a thread of its own, all of them closed at the end."""

import contextlib
import socket
import threading


class Listener:
    """`serve(sock)` is what it does with a connection; `closed` is set at the end. `connections` counts."""

    def __init__(self):
        self.connections = 0
        self.closed = threading.Event()
        self._sockets = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, sock):
        raise NotImplementedError

    def close(self):
        self.closed.set()
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # threads that wait on it end
            sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def keep(self, sock):
        """Send at once, and close at the end."""
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.append(sock)
        return sock

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(self.keep(sock),), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError), sock:
            self.serve(sock)


class Front(Listener):
    """Stands before a server and passes bytes on, through TLS if a context is given: the bundled servers speak none.

    `turns` counts how often a client speaks after the server has: round trips.
    """

    def __init__(self, port, context=None):
        self.turns = 0
        self._to, self._context = port, context
        super().__init__()

    def answered(self, num_bytes):
        """So many bytes of answers come by."""

    def serve(self, sock):
        if self._context is not None:
            sock = self.keep(self._context.wrap_socket(sock, server_side=True))
        server = self.keep(socket.create_connection(("127.0.0.1", self._to)))
        last = [server]

        def pump(source, sink):
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if source is server:
                        self.answered(len(data))
                    elif last[0] is server:
                        self.turns += 1
                    last[0] = source
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=pump, args=(server, sock), daemon=True).start()
        pump(sock, server)
