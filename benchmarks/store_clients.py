"""How fast are kvlab's clients beside the client libraries of the same servers, used bare?

    python scripts/get_servers.py
    pip install pymemcache
    export LD_LIBRARY_PATH=...  # where Mooncake's libraries are, if the system does not have them
    python benchmarks/store_clients.py [--mib 14] [--repeats 15] [--rows FILE] [--systems lm,memcached]

One real server for each system; `get` ends in a buffer of the caller, `put` takes a header and data, as kvlab's objects
are. All clients run in turn in each repeat. LMCache's connector is its protocol's classes on a plain socket, as here.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvlab.hostmemory import address, aligned
from kvlab.machine.lm_server import LMServer, package_folder
from kvlab.machine.memcached_server import MemcachedServer
from kvlab.machine.mooncake_server import MooncakeServer
from kvlab.machine.provenance import append_rows
from kvlab.machine.servers import make_importable
from kvlab.stores import open_store

SMALL = 4096
PATIENT = "timeout_ms=60000"
Client = dict[str, Callable[..., Any]]  # get(key, out), put(key, pieces), has(key)


def kvlab_client(url: str) -> Client:
    store = open_store(url if url.startswith("nixl") else f"{url}{'&' if '?' in url else '?'}{PATIENT}")
    return {"get": store.get_into, "put": store.put, "has": store.contains}


def lmcache_client(server: LMServer) -> Client:
    """What LMCache's connector does: a message, then the value; a put is not confirmed."""
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    if folder := package_folder():
        sys.path.append(folder)
    import torch
    from lmcache.utils import parse_cache_key
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode

    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keys = {key: parse_cache_key(f"bench@1@0@{number}@uint8") for key, number in (("large", "1"), ("small", "2"))}

    def send(command: ClientCommand, key: str, size: int = 0) -> None:
        shape = torch.Size((size, 0, 0, 0))
        message = ClientMetaMessage(command, keys[key], size, MemoryFormat.BINARY, torch.uint8, shape)
        sock.sendall(message.serialize())

    def reply() -> ServerMetaMessage:
        return ServerMetaMessage.deserialize(sock.recv(ServerMetaMessage.packlength(), socket.MSG_WAITALL))

    def get(key: str, out: memoryview) -> None:
        send(ClientCommand.GET, key)
        size, at = reply().length, 0
        while at < size:
            at += sock.recv_into(out[at:size])

    def put(key: str, pieces: list[memoryview]) -> None:
        send(ClientCommand.PUT, key, sum(map(len, pieces)))
        for piece in pieces:
            sock.sendall(piece)

    def has(key: str) -> bool:
        send(ClientCommand.EXIST, key)
        return reply().code == ServerReturnCode.SUCCESS

    return {"get": get, "put": put, "has": has}


def pymemcache_client(server: MemcachedServer) -> Client:
    from pymemcache.client.base import Client as Memcache

    client = Memcache(("127.0.0.1", server.port), no_delay=True, default_noreply=False)

    def get(key: str, out: memoryview) -> None:
        value = client.get(key)
        out[: len(value)] = value

    def put(key: str, pieces: list[memoryview]) -> None:
        client.set(key, b"".join(pieces))

    return {"get": get, "put": put, "has": client.get}


def mooncake_client(server: MooncakeServer) -> Client:
    """The library in this process, with memory that it knows, as its users have it."""
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{server.port}") == 0
    memory = aligned(64 << 20)
    assert store.register_buffer(address(memory), memory.nbytes) == 0

    def get(key: str, out: memoryview) -> None:
        size = store.get_into(key, address(memory), memory.nbytes)
        out[:size] = memory[:size]

    def put(key: str, pieces: list[memoryview]) -> None:
        at = 0
        for piece in pieces:
            memory[at : at + len(piece)] = piece
            at += len(piece)
        assert store.upsert_from(key, address(memory), at) == 0

    return {"get": get, "put": put, "has": store.is_exist}


class NixlFolder:
    """Its "server" is a folder of this machine."""

    def __enter__(self) -> "NixlFolder":
        make_importable("nixl", "nixl_cu12")
        self._folder = tempfile.TemporaryDirectory(dir=Path.home())  # where O_DIRECT is, unlike in memory
        self.path = Path(self._folder.name)
        self.url = f"nixl://{self.path}/kv?size=1GiB"
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def nixl_client(folder: NixlFolder) -> Client:
    """An agent with memory that is registered once, copied to and from; files are made anew and renamed."""
    from kvlab.stores.nixl.transfer import library

    module = library()
    strict = module.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    config = module.nixl_agent_config(backends=[], enable_prog_thread=False, sync_mode=strict)
    agent = module.nixl_agent("bench", config)
    agent.create_backend("POSIX", {})
    memory = aligned(64 << 20)
    place = address(memory)
    agent.register_memory([(place, memory.nbytes, 0, "")], "DRAM")

    def move(operation: str, fd: int, size: int) -> None:
        file = agent.register_memory([(0, size, fd, "")], "FILE")
        ours, theirs = agent.get_xfer_descs([(place, size, 0)], "DRAM"), agent.get_xfer_descs([(0, size, fd)], "FILE")
        handle = agent.initialize_xfer(operation, ours, theirs, agent.name)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        assert state == "DONE"
        agent.release_xfer_handle(handle)
        agent.deregister_memory(file)

    def get(key: str, out: memoryview) -> None:
        fd = os.open(folder.path / key, os.O_RDONLY | os.O_DIRECT)
        size = os.fstat(fd).st_size
        move("READ", fd, size)
        os.close(fd)
        out[:size] = memory[:size]

    def put(key: str, pieces: list[memoryview]) -> None:
        at = 0
        for piece in pieces:
            memory[at : at + len(piece)] = piece
            at += len(piece)
        fd = os.open(folder.path / f"{key}.new", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        move("WRITE", fd, at)
        os.close(fd)
        os.rename(folder.path / f"{key}.new", folder.path / key)

    return {"get": get, "put": put, "has": lambda key: (folder.path / key).exists()}


SYSTEMS: dict[str, tuple[Callable[[], Any], str, Callable[[Any], Client]]] = {
    "lm": (LMServer, "lmcache", lmcache_client),
    "mooncake": (MooncakeServer, "mooncake", mooncake_client),
    "nixl": (NixlFolder, "nixl", nixl_client),
    "memcached": (MemcachedServer, "pymemcache", pymemcache_client),
}


def measure(system: str, size: int, repeats: int) -> Iterator[dict[str, Any]]:
    start_server, library, make = SYSTEMS[system]
    with start_server() as server:
        clients = {"kvlab": kvlab_client(server.url), library: make(server)}
        data, room = aligned(size - SMALL), aligned(size)
        large, small = [memoryview(bytes(SMALL)), data], [memoryview(bytes(SMALL))]
        works: dict[tuple[str, int], Callable[[Client], Any]] = {
            ("put", size): lambda client: (client["put"]("large", large), client["has"]("small")),
            ("get", size): lambda client: client["get"]("large", room),
            ("put", SMALL): lambda client: (client["put"]("small", small), client["has"]("small")),
            ("get", SMALL): lambda client: client["get"]("small", room[:SMALL]),
            ("has", 0): lambda client: client["has"]("small"),
        }
        for client in clients.values():
            client["put"]("small", small)
        for (what, num_bytes), work in works.items():
            times: dict[str, list[float]] = {name: [] for name in clients}
            cpu = dict.fromkeys(clients, 0.0)
            for repeat in range(repeats + 2):
                turn = list(clients)[repeat % len(clients) :] + list(clients)[: repeat % len(clients)]
                for name in turn:  # none always goes first
                    before, start = time.process_time(), time.perf_counter()
                    work(clients[name])
                    if repeat > 1:  # the first ones warm up
                        times[name].append(time.perf_counter() - start)
                        cpu[name] += time.process_time() - before
            for name, seconds in times.items():
                median = statistics.median(seconds)
                yield {
                    "server": system, "client": name, "what": what, "bytes": num_bytes, "repeats": repeats,
                    "ms": round(median * 1e3, 3), "ms_min": round(min(seconds) * 1e3, 3),
                    "cpu_ms": round(cpu[name] / repeats * 1e3, 3), "gb_per_s": round(num_bytes / median / 1e9, 3),
                    "gb_per_s_max": round(num_bytes / min(seconds) / 1e9, 3),
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--rows", type=Path, default=Path("data/measured/store_clients.csv"))
    options = parser.parse_args()
    rows = []
    for system in options.systems.split(","):
        for row in measure(system, options.mib << 20, options.repeats):
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(row)
    append_rows(options.rows, rows, packages=("pymemcache",))


if __name__ == "__main__":
    main()
