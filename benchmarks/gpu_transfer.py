"""How close do transfers come to the link? Pages in GPU memory against one pinned memcpy of the same size.

    python benchmarks/gpu_transfer.py [--rows data/measured/gpu_transfer.csv] [--peers]

The layout is Qwen2.5-7B's in vLLM: 28 layers, pages of 16 tokens, 32 KiB each; a chunk of 256 tokens is 14 MiB.
Every size is checked byte by byte before it is timed. Beside kvlab's transfer: one driver call with a copy per page
(cuMemcpyBatchAsync), and with --peers vLLM's batched block copy and LMCache's kernel, called as their connectors call
them. All are timed with the host clock around a synchronise, each alternating with the memcpy, which uses the same
host memory; medians of `--repeats`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from batched_copies import copies_between, copy_batch
from gpu_transfer_peers import LMCache, vllm_batch

from kvlab.machine.provenance import append_rows
from kvlab.paged import gather, page_layout
from kvlab.paged.cuda import DEFAULT_STAGING_BYTES, CudaTransfer
from kvlab.sharedmemory import LendingMemory, LentMemory, SharedSlots
from kvlab.stores import open_store
from kvlab.units import parse_bytes

LAYERS, BLOCKS, PAGE, TOKENS, HEADS = 28, 2400, 32768, 16, 4
SIZES = (1, 4, 14, 28, 64, 128, 256, 512, 1024)  # MiB


def layout(name="NHD"):
    """Pages of one storage per layer (NHD), or blocks with all their layers together (BLNHC)."""
    if name == "NHD":
        caches = {
            f"layer.{i}": torch.randint(0, 255, (BLOCKS, PAGE), dtype=torch.uint8, device="cuda") for i in range(LAYERS)
        }
    else:
        whole = torch.randint(0, 255, (BLOCKS, LAYERS, PAGE), dtype=torch.uint8, device="cuda")
        caches = {f"layer.{i}": whole[:, i] for i in range(LAYERS)}
    return page_layout(caches, num_blocks=BLOCKS, page_bytes=dict.fromkeys(caches, PAGE), name=name)


def timed(fn) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def pages_of(transfer, blocks):
    return gather(transfer.layout, blocks, transfer.layout.buffer(len(blocks), device="cuda")).cpu()


def check(transfer, blocks, slots) -> None:
    """A save, other bytes in the pages, a load: every byte as it was."""
    before = pages_of(transfer, blocks)
    transfer.arena[torch.tensor(slots)] = 0xA5
    transfer.save(blocks, slots)
    torch.cuda.synchronize()
    assert torch.equal(transfer.slots(slots), before)
    for pages in transfer.layout.pages:
        pages[torch.tensor(blocks, device="cuda")] = 0x5A
    transfer.load(slots, blocks)
    assert torch.equal(pages_of(transfer, blocks), before)


def check_order(transfer, blocks, slots, others) -> None:
    """A load beside the engine's work into pages whose save waits behind a busy engine: the save has the old bytes."""
    before = pages_of(transfer, blocks)
    transfer.arena[torch.tensor(others)] = 0x3C
    torch.cuda._sleep(100_000_000)
    transfer.save(blocks, slots)
    transfer.load_aside(others, blocks, transfer.fence()).end.synchronize()
    assert torch.equal(transfer.slots(slots), before)
    assert (pages_of(transfer, blocks) == 0x3C).all()


def check_slots(transfer, blocks, others, slots) -> None:
    """A load of slots that a save behind a busy engine still has to fill, then a save over slots that are being loaded:
    each waits for the other. Many small copies beside them, so that the trail of copies is long."""
    before = pages_of(transfer, blocks)
    torch.cuda._sleep(50_000_000)
    transfer.save(blocks, slots)
    for i in range(20):
        transfer.save(others[i : i + 1], [max(slots) + 1 + i])
    transfer.load(slots, others)
    transfer.save(blocks[::-1], slots)
    assert torch.equal(pages_of(transfer, others), before)
    assert torch.equal(transfer.slots(slots), before.flip(0))


def check_writes(transfer, blocks, slots) -> None:
    """A save behind a busy engine, larger than the ring: the engine goes on beside it, and what it then writes to the
    same pages the save does not see."""
    before = pages_of(transfer, blocks)
    torch.cuda._sleep(10_000_000)
    engine = transfer.clock()
    save = transfer.save(blocks, slots)
    engine.stop()
    transfer.before_writes(blocks[-1:])
    for pages in transfer.layout.pages:
        pages[torch.tensor(blocks, device="cuda")] = 0x66
    torch.cuda.synchronize()
    assert torch.equal(transfer.slots(slots), before)
    assert engine.seconds() < save.seconds() / 4, (engine.seconds(), save.seconds())


def check_clock(transfer) -> None:
    """A clock knows no time before the work has ended, and then about the right one."""
    clock = transfer.clock()
    start = time.perf_counter()
    torch.cuda._sleep(100_000_000)
    clock.stop()
    assert clock.seconds() is None
    torch.cuda.synchronize()
    assert 0.5 < clock.seconds() / (time.perf_counter() - start) < 1.1


def check_shared() -> None:
    """What another process sees of saves: where the counter says that they are there, they are."""
    pages = layout("NHD")
    shared = SharedSlots(800, pages.block_bytes)
    transfer = CudaTransfer(pages, 800, shared=shared)
    for number in range(1, 40):
        blocks = torch.randperm(BLOCKS)[: 20 * number].tolist()
        slots = torch.randperm(800)[: 20 * number].tolist()
        before = pages_of(transfer, blocks)
        shared.slots[:] = 0
        if number % 2:
            torch.cuda._sleep(20_000_000)
        transfer.save(blocks, slots)
        transfer.mark_saved(number)
        assert number % 2 == 0 or int(shared.copied[0]) < number, "the GPU is busy"
        while int(shared.copied[0]) < number:
            pass
        assert torch.equal(transfer.arena[torch.tensor(slots)], before)
        assert transfer.is_settled(slots)
    transfer.close()
    print("shared memory says what has been saved")


def check_lent() -> None:
    """Blocks of another process's memory, which this one can only read, in runs and scattered; pages that a save still
    has to read are written to behind it."""
    pages = layout("NHD")
    block = pages.block_bytes
    memory = LendingMemory(400 * block)
    memory.bytes.view(np.uint64)[:] = np.random.default_rng(0).integers(0, 1 << 63, memory.bytes.nbytes // 8, np.uint64)
    lent = LentMemory(os.dup(memory.fd), 400 * block)
    transfer = CudaTransfer(pages, 400)
    assert transfer.map_lent(lent.bytes), "memory that can only be read is pinned"
    held = torch.from_numpy(memory.bytes).view(400, LAYERS, PAGE)
    for numbers in (list(range(400)), list(range(7, 300)), torch.randperm(400)[:111].tolist(), [5]):
        blocks = torch.randperm(BLOCKS)[: len(numbers)].tolist()
        before = pages_of(transfer, blocks)
        torch.cuda._sleep(20_000_000)
        transfer.save(blocks, numbers)
        transfer.load_lent([number * block for number in numbers], blocks, transfer.fence()).end.synchronize()
        assert torch.equal(pages_of(transfer, blocks), held[numbers])
        assert torch.equal(transfer.slots(numbers), before)
    transfer.close()


def check_pinned_store() -> None:
    """A memory tier registers exactly its own bytes with CUDA, and what lies there goes to the GPU as it is."""
    value = torch.randint(0, 255, (5 << 20,), dtype=torch.uint8)
    with open_store("memory://?size=48MiB&pinned=true") as store:
        assert store.stats()["pinned"] == 1
        assert store.put("a", memoryview(value.numpy()))
        with store.lease("a") as leased:
            there = torch.from_numpy(np.frombuffer(leased, np.uint8))
            assert there.is_pinned()
            assert torch.equal(there.to("cuda", non_blocking=True).cpu(), value)
    assert not torch.zeros(4096, dtype=torch.uint8).is_pinned()


def check_all() -> None:
    for name in ("NHD", "BLNHC"):
        pages = layout(name)
        transfer = CudaTransfer(pages, 800)
        for count in (1, 7, 16, 300, 701):
            check(transfer, torch.randperm(BLOCKS)[:count].tolist(), torch.randperm(800)[:count].tolist())
        check_order(transfer, list(range(300)), list(range(300)), list(range(300, 600)))
        check_slots(transfer, list(range(300)), list(range(300, 600)), list(range(300)))
        check_writes(transfer, list(range(800)), list(range(800)))
        check_clock(transfer)
        transfer.close()
        print("bytes, order and clocks are right:", name, flush=True)
    check_shared()
    check_lent()
    check_pinned_store()
    print("a pinned memory tier is pinned")


def methods(transfer, peers, blocks, slots):
    """method -> (load, save), each without arguments."""
    ids, rows = np.array(blocks), np.array(slots)
    found = {"kvlab": (lambda: transfer.load(slots, blocks), lambda: transfer.save(blocks, slots))}
    stream = torch.cuda.Stream()
    copies = copies_between(transfer.layout, ids, transfer.arena.data_ptr(), rows)
    found["batch"] = (
        lambda: copy_batch(copies.pages, copies.arena, copies.sizes, stream.cuda_stream),
        lambda: copy_batch(copies.arena, copies.pages, copies.sizes, stream.cuda_stream),
    )
    if peers:
        found["vllm swap_blocks_batch"] = vllm_batch(copies, stream)
        found["lmcache multi_layer_kv_transfer"] = LMCache(transfer.layout, TOKENS, HEADS).methods(blocks)
    return found


def measure(name, peers, repeats, staging_bytes):
    pages = layout(name)
    most = SIZES[-1] * (1 << 20) // pages.block_bytes
    transfer = CudaTransfer(pages, most * 2, staging_bytes=staging_bytes)
    host, device = transfer.arena.view(-1), torch.empty(most * pages.block_bytes, dtype=torch.uint8, device="cuda")
    second = torch.cuda.Stream()
    for mib in SIZES:
        num_blocks = max(mib * (1 << 20) // pages.block_bytes, 1)
        size = num_blocks * pages.block_bytes
        blocks, slots = torch.randperm(BLOCKS)[:num_blocks].tolist(), list(range(num_blocks))
        check(transfer, blocks, slots)

        def down(n=size):
            device[:n].copy_(host[:n], non_blocking=True)

        def up(n=size):
            host[:n].copy_(device[:n], non_blocking=True)

        compared = []
        for method, (load, save) in methods(transfer, peers, blocks, slots).items():
            compared += [("load", method, load, down), ("save", method, save, up)]
        if 2 * size <= most * pages.block_bytes:
            others = [b for b in range(BLOCKS) if b not in set(blocks)][:num_blocks]

            def both(b=blocks, s=slots, o=others, first=most):
                transfer.save(b, s)
                with torch.cuda.stream(second):
                    transfer.load(range(first, first + len(o)), o)

            def two_copies(n=size, first=most * pages.block_bytes):
                host[:n].copy_(device[:n], non_blocking=True)
                with torch.cuda.stream(second):
                    device[n : 2 * n].copy_(host[first : first + n], non_blocking=True)

            compared.append(("both", "kvlab", both, two_copies))
        for what, method, ours, ceiling in compared:
            for fn in (ours, ceiling) * 3:
                fn()
            times = [(timed(ours), timed(ceiling)) for _ in range(repeats)]
            mine, best = (statistics.median(column) for column in zip(*times, strict=True))
            ratios = sorted(b / a for a, b in times)
            moved = size * (2 if what == "both" else 1)
            yield {
                "what": what, "method": method, "layout": name, "mib": round(size / 2**20, 2),
                "gb_per_s": round(moved / mine / 1e9, 2), "memcpy_gb_per_s": round(moved / best / 1e9, 2),
                "ratio": round(statistics.median(ratios), 4), "ratio_p10": round(ratios[len(ratios) // 10], 4),
                "ratio_p90": round(ratios[-1 - len(ratios) // 10], 4), "ms": round(mine * 1e3, 3),
                "staging_mib": transfer.staging_bytes >> 20, "repeats": repeats,
            }  # fmt: skip
    transfer.close()


def arguments(rows: str) -> argparse.ArgumentParser:
    """What this benchmark's command line and that of gpu_transfer_profile.py share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path("data/measured") / rows)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--staging", type=parse_bytes, default=DEFAULT_STAGING_BYTES, help="GPU memory for the buffers between"
    )
    return parser


def report(path: Path, rows: Iterable[dict]) -> None:
    """Print rows as they come and keep them, also where the rest fails."""
    done = []
    try:
        for row in rows:
            done.append(row)
            print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    finally:
        append_rows(path, done)


def main() -> None:
    parser = arguments("gpu_transfer.csv")
    parser.add_argument("--layouts", nargs="*", default=["NHD", "BLNHC"])
    parser.add_argument(
        "--peers", action="store_true", help="also vLLM's and LMCache's copies, which must be installed"
    )
    parser.add_argument("--check-only", action="store_true", help="compare bytes and order, time nothing")
    options = parser.parse_args()
    check_all()
    if options.check_only:
        return
    for name in options.layouts:
        report(options.rows, measure(name, options.peers and name == "NHD", options.repeats, options.staging))


if __name__ == "__main__":
    main()
