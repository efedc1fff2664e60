"""What does the weights' fingerprint add to an engine's start, with the files in the page cache?

    python benchmarks/fingerprint.py [--gib 4] [--rows FILE]

A model of shards with random bytes. `read` is the ceiling: the same threads read the same pieces and hash nothing.
`first` is a start that knows no digest (XXH3, as for weights), `first blake3` the same with the digest that adapters
get, `second` a start that finds them all. Medians of the repeats.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvlab import fingerprint
from kvlab.fingerprint import PIECE_BYTES, files_fingerprint, weight_files
from kvlab.machine.provenance import append_rows

SHARD_BYTES = 1 << 30


def read_alone(files: list[Path]) -> None:
    def read(piece: tuple[Path, int]) -> None:
        file, start = piece
        buffer = memoryview(bytearray(1 << 20))
        with open(file, "rb", buffering=0) as source:
            for offset in range(start, min(start + PIECE_BYTES, file.stat().st_size), len(buffer)):
                os.preadv(source.fileno(), [buffer], offset)

    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, PIECE_BYTES)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(read, pieces))


def median_s(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=Path, default=Path("data/measured/fingerprint.csv"))
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 2)  # of the machine before the run: other work takes cores and memory bandwidth
    with tempfile.TemporaryDirectory(prefix="kvlab-fingerprint-") as place:
        model, known, none = (Path(place) / name for name in ("model", "known", "none"))
        model.mkdir()
        none.write_bytes(b"")  # no folder: as if the cache could not be written
        for shard in range(options.gib):
            with (model / f"model-{shard:05}.safetensors").open("wb") as out:
                for _ in range(SHARD_BYTES >> 26):
                    out.write(os.urandom(1 << 26))
        fingerprint.RACY_NS = 0  # the files were written just now
        files = weight_files(model)
        read_alone(files)  # into the page cache, whatever of it was written back
        first = median_s(lambda: files_fingerprint(files, root=model, cache=none, fast=True), options.repeats)
        slow = median_s(lambda: files_fingerprint(files, root=model, cache=none), options.repeats)
        ceiling = median_s(lambda: read_alone(files), options.repeats)
        files_fingerprint(files, root=model, cache=known, fast=True)
        second = median_s(lambda: files_fingerprint(files, root=model, cache=known, fast=True), options.repeats)
        num_bytes = options.gib * SHARD_BYTES
        rows = [
            {"start": start, "num_bytes": num_bytes, "files": len(files), "seconds": round(seconds, 5),
             "gb_per_s": round(num_bytes / seconds / 1e9, 2) if start != "second" else "",
             "seconds_per_15_gb": round(15e9 * seconds / num_bytes, 3) if start != "second" else "",
             "repeats": options.repeats,
             "load": load}
            for start, seconds in (("read", ceiling), ("first", first), ("first blake3", slow), ("second", second))
        ]  # fmt: skip
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()), flush=True)
    append_rows(options.rows, rows, packages=("blake3", "xxhash"))


if __name__ == "__main__":
    main()
