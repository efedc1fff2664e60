"""How long does packing an object for a secondary tier hold up the engine's thread?

    python benchmarks/save_stalls.py [--rows FILE]

A thread packs objects of 275 tokens of Qwen2.5-7B (15.8 MB, checksum included), 25 a second at most. The main thread
stands in for the engine: short calls that release the GIL and want it back. A stall is a call that took more
than 1 ms. On an idle machine; with its cores busy the system's own scheduling shows instead.
"""

import argparse
import threading
import time
from pathlib import Path

import numpy as np
import xxhash

from kvlab.container import Part, pack
from kvlab.machine.provenance import append_rows

NUM_BYTES = 275 * 57344
STALL_S = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=Path("data/measured/save_stalls.csv"))
    options = parser.parse_args()
    buffers = [np.random.default_rng(i).integers(0, 255, NUM_BYTES, dtype=np.uint8) for i in range(8)]
    short = np.zeros(70_000, np.uint8)  # above 64 KiB xxhash releases the GIL
    for repeat in range(options.repeats):
        over, packed = threading.Event(), [0]

        def save(over: threading.Event = over, packed: list[int] = packed) -> None:
            while not over.wait(0.04):
                data = memoryview(buffers[packed[0] % len(buffers)])
                pack("kvlab:model:namespace:hash", {"kv": Part("U8", (NUM_BYTES,), data)})
                packed[0] += 1

        saver = threading.Thread(target=save)
        saver.start()
        calls, last = [], time.perf_counter()
        end = last + options.seconds
        while last < end:
            xxhash.xxh3_64(short)
            now = time.perf_counter()
            calls.append(now - last)
            last = now
        over.set()
        saver.join()
        stalls = [seconds for seconds in calls if seconds > STALL_S]
        row = {
            "repeat": repeat, "object_bytes": NUM_BYTES, "objects": packed[0],
            "stalls_per_object": round(len(stalls) / packed[0], 3),
            "stalled_ms_per_object": round(sum(stalls) * 1e3 / packed[0], 3),
            "longest_ms": round(max(calls) * 1e3, 3),
        }  # fmt: skip
        print(*(f"{name}={value}" for name, value in row.items()), flush=True)
        append_rows(options.rows, [row], packages=("xxhash",))


if __name__ == "__main__":
    main()
