"""How close do staged loads and saves come to the link? Pages in GPU memory against one pinned memcpy of the same size.

    python benchmarks/gpu_transfer.py [--rows data/measured/gpu_transfer.csv]

The layout is Qwen2.5-7B's in vLLM: 28 layers, pages of 16 tokens, 32 KiB each; a chunk of 256 tokens is 14 MiB.
Every size is checked byte by byte before it is timed. Both are timed with the host clock around a synchronise,
alternating, so that drift hits both; medians of `--repeats`.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from kvlab.bench.provenance import append_rows
from kvlab.paged import gather, page_layout
from kvlab.paged.staging import CudaTransfer, pinned_arena

LAYERS, BLOCKS, PAGE = 28, 2400, 32768


def layout():
    caches = {
        f"layer.{i}": torch.randint(0, 255, (BLOCKS, PAGE), dtype=torch.uint8, device="cuda") for i in range(LAYERS)
    }
    return page_layout(caches, num_blocks=BLOCKS, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")


def timed(fn) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def check(transfer, blocks, slots) -> None:
    """A save, other bytes in the pages, a load: every byte as it was."""
    before = gather(transfer.layout, blocks, transfer.layout.buffer(len(blocks), device="cuda"))
    transfer.arena[: len(slots)].fill_(0xA5)
    transfer.save(blocks, slots)
    torch.cuda.synchronize()
    assert torch.equal(transfer.slots(slots), before.cpu())
    for pages in transfer.layout.pages:
        pages[torch.tensor(blocks, device="cuda")] = 0x5A
    transfer.load(slots, blocks)
    assert torch.equal(gather(transfer.layout, blocks, transfer.layout.buffer(len(blocks), device="cuda")), before)


def check_order(transfer, blocks, slots, others) -> None:
    """A load from a thread's stream into pages whose save waits behind a busy engine: the save has the old bytes."""
    before = gather(transfer.layout, blocks, transfer.layout.buffer(len(blocks), device="cuda")).cpu()
    transfer.arena[others].fill_(0x3C)
    torch.cuda._sleep(100_000_000)
    transfer.save(blocks, slots)
    transfer.load_and_wait(others, blocks, transfer.fence())
    assert torch.equal(transfer.slots(slots), before)
    assert (gather(transfer.layout, blocks, transfer.layout.buffer(len(blocks), device="cuda")) == 0x3C).all()


def check_clock(transfer) -> None:
    """A clock knows no time before the work has ended, and then about the right one."""
    clock = transfer.clock()
    start = time.perf_counter()
    torch.cuda._sleep(100_000_000)
    clock.stop()
    assert clock.seconds() is None
    torch.cuda.synchronize()
    assert 0.5 < clock.seconds() / (time.perf_counter() - start) < 1.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path("data/measured/gpu_transfer.csv"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--staging-mib", type=int, nargs="*", default=[128])
    parser.add_argument("--check-only", action="store_true", help="compare bytes and order, time nothing")
    options = parser.parse_args()
    pages = layout()
    block_bytes = pages.block_bytes
    most = 1024 * (1 << 20) // block_bytes
    host = pinned_arena(most * block_bytes)
    device = torch.empty(most * block_bytes, dtype=torch.uint8, device="cuda")
    rows = []
    for staging in options.staging_mib:
        transfer = CudaTransfer(pages, most * 2, staging_bytes=staging << 20)
        for mib in (1, 4, 14, 28, 64, 128, 256, 512, 1024):
            num_blocks = max(mib * (1 << 20) // block_bytes, 1)
            size = num_blocks * block_bytes
            blocks = torch.randperm(BLOCKS)[:num_blocks].tolist()
            slots = list(range(num_blocks))
            check(transfer, blocks, slots)
            if options.check_only:
                continue
            other_blocks = [b for b in range(BLOCKS) if b not in set(blocks)][:num_blocks]
            other_slots = list(range(most, most + num_blocks))
            second = torch.cuda.Stream()

            def both(b=blocks, s=slots, ob=other_blocks, os=other_slots):
                transfer.save(b, s)
                with torch.cuda.stream(second):
                    transfer.load(os, ob)

            def two_copies(n=size):
                host[:n].copy_(device[:n], non_blocking=True)
                with torch.cuda.stream(second):
                    device[n : 2 * n].copy_(host[n : 2 * n], non_blocking=True)

            pairs = {
                "load": (
                    lambda b=blocks, s=slots: transfer.load(s, b),
                    lambda n=size: device[:n].copy_(host[:n], non_blocking=True),
                ),
                "save": (
                    lambda b=blocks, s=slots: transfer.save(b, s),
                    lambda n=size: host[:n].copy_(device[:n], non_blocking=True),
                ),
            }
            if 2 * size <= most * block_bytes:
                pairs["both"] = (both, two_copies)
            for what, (ours, ceiling) in pairs.items():
                for fn in (ours, ceiling) * 3:
                    fn()
                times = [(timed(ours), timed(ceiling)) for _ in range(options.repeats)]
                mine, best = (statistics.median(column) for column in zip(*times, strict=True))
                moved = size * (2 if what == "both" else 1)
                ratio = statistics.median(b / a for a, b in times)
                row = {
                    "what": what, "mib": round(size / 2**20, 2), "staging_mib": staging,
                    "gb_per_s": round(moved / mine / 1e9, 2), "memcpy_gb_per_s": round(moved / best / 1e9, 2),
                    "ratio": round(ratio, 4), "ms": round(mine * 1e3, 3), "repeats": options.repeats,
                }  # fmt: skip
                rows.append(row)
                print(*(f"{k}={v}" for k, v in row.items()), flush=True)
        check_order(transfer, list(range(300)), list(range(300)), list(range(300, 600)))
        check_clock(transfer)
        transfer.close()
    if not options.check_only:
        append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
