"""A cache server's counters, as Prometheus reads them."""

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from kvlab.errors import ConfigError
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.places import Places

logger = logging.getLogger("kvlab.serve")
MAX_SCRAPES = 16  # at a time; a new one takes the place of the oldest
SCRAPE_S = 10.0  # for all of it, however slowly it is asked for or taken
TIER_METRICS = {  # field of a store's row -> (metric, type, what it is)
    "used_bytes": ("tier_used_bytes", "gauge", "Bytes that a tier holds."),
    "max_bytes": ("tier_max_bytes", "gauge", "Bytes that a tier may hold."),
    "hits": ("tier_hits_total", "counter", "Objects read from a tier."),
    "misses": ("tier_misses_total", "counter", "Objects that a tier was asked for and did not hold."),
    "puts": ("tier_puts_total", "counter", "Objects written to a tier."),
    "get_bytes": ("tier_read_bytes_total", "counter", "Bytes read from a tier."),
    "put_bytes": ("tier_written_bytes_total", "counter", "Bytes written to a tier."),
    "evictions": ("tier_evictions_total", "counter", "Objects that a tier evicted."),
    "up": ("tier_up", "gauge", "1 while a tier answers, 0 while it is left alone after a failure."),
}


def lines(server: CacheServer) -> Iterator[str]:
    """In Prometheus' text format."""
    engines = (
        ("engines", server.num_engines, "gauge", "Engines that are attached."),
        ("engines_total", server.num_attached, "counter", "Engines that have attached since the start."),
    )
    for name, count, kind, about in engines:
        yield f"# HELP kvlab_{name} {about}\n# TYPE kvlab_{name} {kind}\nkvlab_{name} {count}\n"
    rows = server.store.rows()
    for field, (name, kind, about) in TIER_METRICS.items():
        yield f"# HELP kvlab_{name} {about}\n# TYPE kvlab_{name} {kind}\n"
        for row in rows:
            value = row.get(field, 1 if field == "up" else 0)
            yield f'kvlab_{name}{{tier="{row["tier"]}"}} {value}\n'


class _Server(ThreadingHTTPServer):
    """Has few places for clients, and none for long."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._places = Places(MAX_SCRAPES)
        super().__init__(*args)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        assert isinstance(request, socket.socket)
        self._places.enter(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        assert isinstance(request, socket.socket)
        self._places.leave(request)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self._places.end_those_of(SCRAPE_S)

    def handle_error(self, *_: Any) -> None:
        """A client that ends in the middle is no news."""
        if not isinstance(sys.exception(), OSError):
            logger.exception("kvlab serve: a scrape failed")


class MetricsServer:
    """Answers ``GET /metrics`` at `address` (host:port) while the context runs. ConfigError where it cannot listen."""

    def __init__(self, server: CacheServer, address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError(f"--metrics must be HOST:PORT, got {address!r}")

        class Handler(BaseHTTPRequestHandler):
            timeout = SCRAPE_S

            def do_GET(self) -> None:
                if self.path != "/metrics":
                    self.send_error(404)
                    return
                body = "".join(lines(server)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: a scrape every few seconds is no news."""

        try:
            self._http = _Server((host.strip("[]"), int(port)), Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigError(f"cannot serve metrics at {address!r}: {error}") from error
        self.port = self._http.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, name="kvlab-metrics", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
