"""How fast does a tier worker fill an engine's slots from disk or Redis, beside the medium read bare?

    python benchmarks/tier_loads.py --folder FOLDER [--threads 4,8,16] [--rows data/measured/tier_loads.csv]

Slots are Qwen2.5-7B's blocks in vLLM: 28 layers, 16 tokens, 32 KiB each; an object of 256 tokens is 14 MiB. A request
of 1, 8 or 58 objects (15,000 tokens) is asked of a tier worker at once, as a connector asks, and is over when the last
object is in its slots, checked. Beside it the *bare* medium, with several numbers of threads: files read with
``preadv`` (with O_DIRECT where the file system has it) and values received from sockets, into memory that is used
again, unchecked. Numbers of threads and both readers take turns; medians of `--repeats`.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvlab.hashing import Namespace
from kvlab.hostmemory import aligned
from kvlab.machine.provenance import append_rows
from kvlab.machine.redis_server import RedisServer
from kvlab.sharedmemory import SharedSlots
from kvlab.tierworker import server
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Fill, Memory, Opening, Write, runs_of

LAYERS, PAGE, BLOCK, CHUNK = 28, 32768, 16, 256
BLOCKS = CHUNK // BLOCK
OBJECTS = (1, 8, 58)
OBJECT_BYTES = BLOCKS * LAYERS * PAGE
NAMESPACE = Namespace("bench")


class Tier:
    """A tier worker over one store, which holds `most` objects of random bytes."""

    def __init__(self, url: str, most: int) -> None:
        self.client = TierClient(Opening([url], "naive", None, [{"model": "bench", "fields": {}}]))
        self.shared = SharedSlots(most * BLOCKS, LAYERS * PAGE)
        self.client.share(Memory(most * BLOCKS, LAYERS, PAGE), self.shared)
        rng = np.random.default_rng(0)
        for slot in self.shared.slots:
            slot[:] = np.frombuffer(rng.bytes(slot.nbytes), np.uint8)
        self.shared.owners[:] = 1
        self._first = self.shared.slots[:BLOCKS].copy()
        left = [most]
        for number in range(most):
            write = Write(self.client.next_id(), *self._place(number), generation=1, after=0)
            self.client.write(write, lambda message, _: left.append(left.pop() - bool(message and message["ok"])))
        self._wait(lambda: left[0] == 0)

    @staticmethod
    def _place(number: int) -> tuple:
        slots = runs_of(range(number * BLOCKS, (number + 1) * BLOCKS))
        return 0, "", name(number).hex(), slots, number * CHUNK, (number + 1) * CHUNK

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline
            self.client.wait(0.01)

    def load(self, count: int) -> float:
        """Seconds until so many objects are in their slots."""
        self.shared.slots[:BLOCKS] = 0
        served: list[bool] = []
        start = time.perf_counter()
        for number in range(count):
            fill = Fill(self.client.next_id(), *self._place(number))
            self.client.fill(fill, lambda message, _: served.append(bool(message and message["tier"])))
        self._wait(lambda: len(served) == count)
        seconds = time.perf_counter() - start
        assert all(served)
        assert np.array_equal(self.shared.slots[:BLOCKS], self._first)
        return seconds


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


def bare_files(folder: Path, most: int) -> Callable[[int], None]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > OBJECT_BYTES)
    assert len(paths) >= most
    rooms = [aligned(OBJECT_BYTES + (1 << 16)) for _ in range(most)]

    def read(number: int) -> None:
        try:
            fd = os.open(paths[number], os.O_RDONLY | os.O_DIRECT)
        except OSError:
            fd = os.open(paths[number], os.O_RDONLY)
        try:
            assert os.preadv(fd, [rooms[number]], 0) >= OBJECT_BYTES
        finally:
            os.close(fd)

    return read


def bare_sockets(port: int, most: int, threads: int) -> Callable[[int], None]:
    links = [socket.create_connection(("127.0.0.1", port)) for _ in range(threads)]
    rooms = [memoryview(bytearray(OBJECT_BYTES + (1 << 16))) for _ in range(threads)]
    free = list(range(threads))
    for link in links:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)

    def read(number: int) -> None:
        at = free.pop()
        key = NAMESPACE.key(name(number)).encode()
        links[at].sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
        got, size = 0, -1
        while size < 0 or got < size:
            got += links[at].recv_into(rooms[at][got:])
            if size < 0 and (end := bytes(rooms[at][:32]).find(b"\r\n")) > 0:
                size = int(bytes(rooms[at][1:end])) + end + 4
        free.append(at)

    return read


def measure(what: str, url: str, bare: Callable[[int], Callable[[int], None]], options) -> Iterator[dict]:
    most = max(OBJECTS)
    tier = Tier(url, most)
    readers = {threads: bare(threads) for threads in options.threads}
    pools = {threads: ThreadPoolExecutor(threads) for threads in options.threads}
    for count in OBJECTS:
        times: dict[tuple[str, int], list[float]] = {}
        for at in range(options.repeats + 1):
            for threads in options.threads:
                start = time.perf_counter()
                list(pools[threads].map(readers[threads], range(count)))
                if at:  # the first round warms up
                    times.setdefault(("bare", threads), []).append(time.perf_counter() - start)
            seconds = tier.load(count)
            if at:
                times.setdefault(("worker", server.READ_THREADS), []).append(seconds)
        for (reader, threads), seconds in times.items():
            middle = statistics.median(seconds)
            yield {
                "tier": what, "reader": reader, "threads": threads, "objects": count,
                "mib": count * OBJECT_BYTES >> 20, "ms": round(middle * 1e3, 2), "ms_min": round(min(seconds) * 1e3, 2),
                "ms_max": round(max(seconds) * 1e3, 2), "gb_per_s": round(count * OBJECT_BYTES / middle / 1e9, 3),
                "repeats": options.repeats,
            }  # fmt: skip
    tier.client.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8, 16], help="of the bare readers"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--medium", default="disk", help="what FOLDER lies on, for the rows")
    parser.add_argument("--only", choices=["disk", "redis"])
    parser.add_argument("--rows", type=Path, default=Path("data/measured/tier_loads.csv"))
    options = parser.parse_args()
    rows: list[dict] = []

    def add(found: Iterator[dict]) -> None:
        for row in found:
            print(*(f"{key}={value}" for key, value in row.items()), flush=True)
            rows.append(row)

    if options.only != "redis":
        folder = options.folder.resolve() / "tier_loads"
        add(measure(options.medium, f"file://{folder}?size=4GiB", lambda _: bare_files(folder, max(OBJECTS)), options))
    if options.only != "disk":
        with RedisServer() as redis:
            port = int(redis.url.rpartition(":")[2].partition("/")[0].partition("?")[0])
            add(measure("Redis, TCP", redis.url, lambda n: bare_sockets(port, max(OBJECTS), n), options))
    append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
