"""What does signing objects cost? Sealing and checking an object of 256 tokens, with and without a key, on one core.

    python benchmarks/auth.py [--rows FILE]

The object holds 256 tokens of Qwen2.5-7B (14.7 MB of bf16 KV). *seal* and *check* are `pack` and `unpack` in memory;
*load* and *save* go through `CacheEngine` and a file that lies in the page cache. The rows of MACs alone are those that
the choice was made between: BLAKE3 keyed, and the two that Python brings.
"""

import argparse
import hashlib
import hmac
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import torch
import xxhash

from kvlab.auth import AuthKey
from kvlab.container import Part, pack, packed_bytes, unpack
from kvlab.engine import CacheEngine
from kvlab.machine.provenance import append_rows
from kvlab.stores import open_store

PAGES = ("blocks", "layers", "page_bytes")
SHAPE = (16, 28, 32_768)  # blocks of 16 tokens: 28 layers, 4 heads, K and V, 128 channels of 2 bytes
TOKENS = {"first_token": 0, "end_token": 256}
SECRET = bytes(range(32))


def times_s(work: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times[1:]  # the first warms up


def macs(data: memoryview) -> dict[str, Callable[[], Any]]:
    return {
        "xxh3-128, no key": lambda: xxhash.xxh3_128(data).digest(),
        "blake3 keyed": lambda: blake3.blake3(data, key=SECRET).digest(),
        "hmac-sha256": lambda: hmac.digest(SECRET, data, "sha256"),
        "blake2b keyed": lambda: hashlib.blake2b(data, key=SECRET, digest_size=32).digest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--rows", type=Path, default=Path("data/measured/auth.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pages = torch.randint(0, 256, SHAPE, dtype=torch.uint8)
    data = memoryview(pages.numpy()).cast("B")
    cases = {("MAC alone", name): work for name, work in macs(data).items()}
    part = {"payload": Part("U8", SHAPE, data)}
    out = torch.empty_like(pages)
    with tempfile.TemporaryDirectory() as folder, open_store(f"file://{folder}?size=1GiB&direct=false") as store:
        for key in (None, AuthKey(SECRET)):
            name = "auth" if key else "no auth"
            stored = b"".join(bytes(memoryview(piece)) for piece in pack("k", part, {}, auth=key))
            engine = CacheEngine(store, namespace="bench", auth=key)
            cases |= {
                ("seal", name): lambda key=key: packed_bytes(pack("k", part, {}, auth=key)),
                ("check", name): lambda key=key, stored=stored: unpack(stored, "k", auth=key),
                ("save", name): lambda engine=engine: engine.save_object(
                    engine.namespace.key(b""), pages, PAGES, **TOKENS
                ),
                ("load", name): lambda engine=engine: engine.load_object(
                    engine.namespace.key(b""), out, axes=PAGES, **TOKENS
                ),
            }
        rows = []
        for (what, how), work in cases.items():
            assert work() is not None
            times = times_s(work, options.repeats)
            seconds = statistics.median(times)
            rows.append({
                "what": what, "how": how, "mib": round(data.nbytes / (1 << 20), 1),
                "ms": round(seconds * 1e3, 3), "ms_min": round(min(times) * 1e3, 3),
                "gb_per_s": round(data.nbytes / seconds / 1e9, 2),
                "gb_per_s_max": round(data.nbytes / min(times) / 1e9, 2), "repeats": options.repeats,
            })  # fmt: skip
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    append_rows(options.rows, rows, packages=("blake3", "xxhash", "torch"))


if __name__ == "__main__":
    main()
