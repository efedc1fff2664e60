"""How long does a request wait for its KV from disk or Redis? A connector's worker loads objects side by side.

    python benchmarks/tier_loads.py --folder FOLDER [--rows data/measured/tier_loads.csv]

Pages are Qwen2.5-7B's in vLLM: 28 layers, 16 tokens, 32 KiB each; a chunk of 256 tokens is 14 MiB. Requests of 1 to 18
chunks are fetched into a connector's host memory by so many threads, one request after the other, while the
interpreter's main thread is idle and while it computes as an engine's does (3 ms of Python, then 1 ms of waiting). The
copy to the pages is the GPU's and left out. Beside each: the store alone, read by one thread. Numbers of threads take
turns; medians of `--repeats`.
"""

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.messages import LoadOp, RequestLoad, StepMetadata
from kvlab.connectors.vllm.worker.worker import PAGE_AXES, Worker
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.hostmemory import aligned
from kvlab.machine.provenance import append_rows
from kvlab.machine.redis_server import RedisServer
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.stores import open_store

LAYERS, PAGE, BLOCK, CHUNK = 28, 32768, 16, 256
BLOCKS = CHUNK // BLOCK
CHUNKS = (1, 18)
THREADS = (1, 4)


class Arena(CPUTransfer):
    """Host memory whose way to the pages costs nothing."""

    def load(self, slots, block_ids):
        pass


def make_worker(url, most):
    """A worker over one store, with `most` chunks of random bytes in it under the hashes 0, 1, ..."""
    blocks = most * BLOCKS
    caches = {f"layer.{i}": torch.zeros(1, PAGE, dtype=torch.uint8) for i in range(LAYERS)}
    layout = page_layout(caches, num_blocks=1, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")
    engine = CacheEngine(open_store(url), namespace=Namespace("bench"), chunker=Chunker(CHUNK, BLOCK))
    worker = Worker(Arena(layout, blocks), blocks, engine)
    for chunk in range(most):
        kept = engine.save_object(engine.namespace.key(name(chunk)), content(chunk), PAGE_AXES, **place(chunk))
        assert kept
    return worker


@cache
def content(chunk):
    rng = np.random.default_rng(chunk)
    return torch.from_numpy(rng.integers(0, 255, (BLOCKS, LAYERS, PAGE), dtype=np.uint8))


def place(chunk):
    return {"first_token": chunk * CHUNK, "end_token": (chunk + 1) * CHUNK}


def name(chunk):
    return chunk.to_bytes(32, "little")


def load(worker, count):
    """Seconds of one request's load, as the worker reports them."""
    worker._owner = [None] * len(worker._owner)
    ops = []
    for chunk in range(count):
        slots = tuple(range(chunk * BLOCKS, (chunk + 1) * BLOCKS))
        ops.append(LoadOp(name(chunk), chunk, slots, slots, slots, **place(chunk), num_tokens=CHUNK, fetch=True))
    worker.load(StepMetadata([RequestLoad("r", ops, count * CHUNK, is_async=True)]))
    while "r" not in worker.take_finished()[0]:
        time.sleep(0.001)
    assert not worker.take_lost_blocks()
    row = worker.take_report().rows[0]
    assert row.num_tokens == count * CHUNK
    for chunk in {0, count - 1}:
        assert torch.equal(worker.transfer.slots(ops[chunk].slots), content(chunk))
    return row.seconds


def read(worker, count, room):
    """Seconds in which one thread reads the same values from the store."""
    start = time.perf_counter()
    for chunk in range(count):
        assert worker.engine.store.get_into(worker.engine.namespace.key(name(chunk)), room)
    return time.perf_counter() - start


def beside(work, *, busy):
    """What `work` returns in a thread, while the main thread is idle or busy as an engine's."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    while thread.is_alive():
        until = time.perf_counter() + (0.003 if busy else 0)
        while time.perf_counter() < until:
            sum(range(50))
        time.sleep(0.001)
    return found[0]


def measure(tier, url, repeats):
    worker = make_worker(url, CHUNKS[-1])
    pools = {count: ThreadPoolExecutor(count) for count in THREADS}
    room = aligned(BLOCKS * LAYERS * PAGE + (1 << 16))
    for busy in (False, True):
        for count in CHUNKS:
            times = {threads: [] for threads in (0, *THREADS)}
            for at in range(repeats + 1):
                for threads in times:
                    if threads:
                        worker._fetches = pools[threads]
                        seconds = beside(lambda: load(worker, count), busy=busy)
                    else:
                        seconds = beside(lambda: read(worker, count, room), busy=busy)
                    if at:  # the first round warms up
                        times[threads].append(seconds)
            num_bytes = count * BLOCKS * LAYERS * PAGE
            for threads, seconds in times.items():
                middle = statistics.median(seconds)
                yield {
                    "tier": tier, "what": f"{threads} threads" if threads else "store alone", "chunks": count,
                    "mib": num_bytes >> 20, "main_thread": "busy" if busy else "idle", "ms": round(middle * 1e3, 2),
                    "ms_min": round(min(seconds) * 1e3, 2), "ms_max": round(max(seconds) * 1e3, 2),
                    "gb_per_s": round(num_bytes / middle / 1e9, 3), "repeats": repeats,
                }  # fmt: skip
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=Path, default=Path("data/measured/tier_loads.csv"))
    options = parser.parse_args()
    rows = []
    with RedisServer() as server:
        tiers = {"disk": f"file://{options.folder.resolve()}/tier_loads?size=2GiB", "redis, TCP": server.url}
        for tier, url in tiers.items():
            for row in measure(tier, url, options.repeats):
                rows.append(row)
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
