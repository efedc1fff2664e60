"""Where does a transfer's time go beyond its bytes? Calls by the host clock, copies and kernels by the profiler.

    python benchmarks/gpu_transfer_profile.py [--rows data/measured/gpu_transfer_profile.csv]

For loads and saves of several sizes, in microseconds, medians of `--repeats`: `queue` until the call returned, `whole`
until the GPU has ended, `memcpy` one pinned copy of the same bytes. From torch's profiler, which makes calls slower:
`head` from the call to the first byte's copy, `copies` their sum, `gaps` between them, `tail` from the last copy's end
to the last kernel's. A save's head holds its first gather, a load's tail its last scatter.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from gpu_transfer import BLOCKS, arguments, layout, report, timed
from torch.profiler import ProfilerActivity, profile, record_function

from kvlab.paged.cuda import CudaTransfer

SIZES = (14, 64, 128, 512)  # MiB
CALL = "kvlab call"


def parts(trace: list[dict], direction: str) -> list[dict[str, float]]:
    """Of a Chrome trace: head, copies, gaps and tail of each annotated call, which was waited for before the next."""
    calls = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in trace if e.get("name") == CALL and e["cat"] == "user_annotation"
    )
    work = sorted(
        (e["ts"], e["ts"] + e["dur"], e["cat"] == "gpu_memcpy" and direction in e["name"])
        for e in trace
        if e.get("cat") in ("gpu_memcpy", "kernel")
    )
    found = []
    for at, (start, _) in enumerate(calls):
        until = calls[at + 1][0] if at + 1 < len(calls) else float("inf")
        mine = [each for each in work if start <= each[0] < until]
        copies = [(begin, end) for begin, end, is_copy in mine if is_copy]
        spent = sum(end - begin for begin, end in copies)
        found.append(
            {
                "pieces": len(copies),
                "head": copies[0][0] - start,
                "copies": spent,
                "gaps": copies[-1][1] - copies[0][0] - spent,
                "tail": max(end for _, end, _ in mine) - copies[-1][1],
            }
        )
    return found


def queued(fn) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent


def measure(repeats: int, staging_bytes: int):
    pages = layout("NHD")
    most = SIZES[-1] * (1 << 20) // pages.block_bytes
    transfer = CudaTransfer(pages, most, staging_bytes=staging_bytes)
    host = transfer.arena.view(-1)
    device = torch.empty(most * pages.block_bytes, dtype=torch.uint8, device="cuda")
    for mib in SIZES:
        num_blocks = mib * (1 << 20) // pages.block_bytes
        size = num_blocks * pages.block_bytes
        blocks, slots = torch.randperm(BLOCKS)[:num_blocks].tolist(), list(range(num_blocks))

        def load(s=slots, b=blocks):
            transfer.load(s, b)

        def save(s=slots, b=blocks):
            transfer.save(b, s)

        def down(n=size):
            device[:n].copy_(host[:n], non_blocking=True)

        def up(n=size):
            host[:n].copy_(device[:n], non_blocking=True)

        for what, ours, ceiling, direction in (("load", load, down, "HtoD"), ("save", save, up, "DtoH")):
            for fn in (ours, ceiling) * 3:
                fn()
            times = [(queued(ours), timed(ours), timed(ceiling)) for _ in range(repeats)]
            queue, whole, memcpy = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                for _ in range(repeats):
                    torch.cuda.synchronize()
                    with record_function(CALL):
                        ours()
                    torch.cuda.synchronize()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(path))
                seen = parts(json.loads(path.read_text())["traceEvents"], direction)
            middle = {name: round(statistics.median(each[name] for each in seen), 1) for name in seen[0]}
            yield {
                "what": what, "mib": round(size / 2**20, 2), "queue": round(queue, 1), "whole": round(whole, 1),
                "memcpy": round(memcpy, 1), **middle, "staging_mib": transfer.staging_bytes >> 20, "repeats": repeats,
            }  # fmt: skip
    transfer.close()


def main() -> None:
    options = arguments("gpu_transfer_profile.csv").parse_args()
    report(options.rows, measure(options.repeats, options.staging))


if __name__ == "__main__":
    main()
