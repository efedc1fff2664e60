"""Are slots with a codec right on a real GPU, and how fast do blocks move between them and pages?

    python benchmarks/gpu_coded_slots.py [--rounds 50] [--rows data/measured/gpu_coded_slots.csv]
    python benchmarks/gpu_coded_slots.py --check-only

First saves and loads in random order, on all of the transfer's streams and without a wait between them, must leave
pages and slots as the twin in torch leaves them, each copy run alone; and a block with a NaN must be told. Then, in the
layout of Qwen2.5-7B in vLLM (28 layers, 4 KV heads of 128, blocks of 16 tokens), medians of `--repeats` in GB/s of raw
KV for a save and for a load of `--mib`, beside the plain transfer's in the same turns.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from random import Random

import torch
from gpu_codecs import BLOCK, QWEN, Engine, kv_like, map_of, seconds_of

from kvlab.codecs.blocks import BlockCodec
from kvlab.codecs.cuda import CodedCudaTransfer
from kvlab.machine.provenance import append_rows
from kvlab.paged.cuda import CudaTransfer
from kvlab.serde import get_serde

SPECS = ("int8", "fp8", "int4", "int8:k=channel,v=token", "int4:k=token,group=7", "rotated4", "centered",
         "centered:bits=8,style=pairs,rotary=32")  # fmt: skip
SHAPES = (("NHC", 2, 64), ("HNC", 1, 128), ("NHD", 3, 80), ("HND", 8, 64), ("latents", 1, 576))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LAYERS, BLOCKS, SLOTS, OPERATIONS = 3, 24, 20, 12
KINDS = ("int8", "fp8", "int4", "rotated4", "centered")


def filled(spec: str, shape: tuple[str, int, int], element: torch.dtype, seed: int) -> tuple[Engine, BlockCodec]:
    """Pages of numbers, and a codec of their blocks."""
    page_map = map_of(*shape, element, slack=64 * (seed % 2))
    made = Engine(page_map, BLOCKS, "cuda", LAYERS, seed)
    made.typed.write(kv_like(page_map.shape(LAYERS, BLOCKS * BLOCK), element, seed).cuda(), list(range(BLOCKS)))
    return made, BlockCodec(get_serde(spec), page_map, LAYERS)


def check(seed: int) -> int:
    """One engine and one order of copies; how many copies there were."""
    random = Random(seed)
    spec, shape, element = SPECS[seed % len(SPECS)], SHAPES[seed // len(SPECS) % 5], FLOATS[seed % 3]
    if shape[0] == "latents" and spec.startswith("centered"):
        shape = SHAPES[0]  # which it has none of
    pages, codec = filled(spec, shape, element, seed)
    want = pages.all().transpose(0, 1).contiguous()  # by block
    held = torch.zeros(SLOTS, codec.slot_bytes, dtype=torch.uint8)
    counts: dict[int, int] = {}
    staging = 8 * codec.slot_bytes * random.randint(1, 4)
    transfer = CodedCudaTransfer(pages.typed.layout, codec, SLOTS, staging_bytes=staging)
    where = f"{spec}, {shape}, {element}, seed {seed}"
    for _ in range(OPERATIONS):
        count = random.randint(1, 9)
        ids = random.sample(range(BLOCKS), count)
        known = [slot for slot in counts if random.random() < 0.7]
        if known and random.random() < 0.5:
            slots = known[:count]
            tokens = [counts[slot] for slot in slots]
            load = random.choice((transfer.load, partial(transfer.load_aside, after=transfer.fence())))
            done = load(slots, ids[: len(slots)], num_tokens=tokens)
            if load is not transfer.load:  # what the engine does next is ordered behind it by the caller
                torch.cuda.current_stream().wait_event(done.end)
            for slot, block_id, number in zip(slots, ids, tokens, strict=False):
                codec.decode(held[slot], number, want[block_id])
        else:
            slots = random.sample(range(SLOTS), count)
            tokens = [random.choice((BLOCK, BLOCK, random.randint(1, BLOCK))) for _ in slots]
            transfer.save(ids, slots, tokens)
            transfer.before_writes(ids)
            for slot, block_id, number in zip(slots, ids, tokens, strict=True):
                codec.encode(want[block_id], number, held[slot])
                counts[slot] = number
        if random.random() < 0.2:
            transfer.clear(ids[:1])
            want[ids[0]] = 0
    torch.cuda.synchronize()
    assert not transfer.take_unfit(), where
    for slot in counts:
        assert transfer.arena[slot].equal(held[slot]), f"slot {slot} differs from the twin's: {where}"
    assert pages.all().transpose(0, 1).equal(want), f"pages differ from the twin's: {where}"

    page = kv_like(codec.map.shape(LAYERS, BLOCK), element, seed)
    page[LAYERS - 1, random.randrange(BLOCK), 0, 0, 1] = random.choice((float("nan"), float("inf"), -float("inf")))
    pages.typed.write(page.cuda(), [1])
    transfer.save([0, 1, 2], [5, 6, 7], [BLOCK] * 3)
    torch.cuda.synchronize()
    assert transfer.take_unfit() == {6}, where
    transfer.close()
    return OPERATIONS


def rows(sizes: list[int], repeats: int) -> list[dict[str, object]]:
    name, heads, dim, layers = QWEN
    page_map = map_of(name, heads, dim, torch.bfloat16)
    block_bytes = layers * page_map.page_bytes
    most = max(sizes) * 2**20 // block_bytes
    pages = Engine(page_map, most, "cuda", layers)
    for first in range(0, most, 64):
        ids = list(range(first, min(first + 64, most)))
        pages.typed.write(kv_like(page_map.shape(layers, len(ids) * BLOCK), torch.bfloat16, first).cuda(), ids)
    order = Random(0).sample(range(most), most)
    plain = CudaTransfer(pages.typed.layout, most)
    found: list[dict[str, object]] = []
    for spec in KINDS:
        codec = BlockCodec(get_serde(spec), page_map, layers)
        coded = CodedCudaTransfer(pages.typed.layout, codec, most, staging_bytes=128 << 20)
        for mib in sizes:
            count = mib * 2**20 // block_bytes
            ids, slots, tokens = order[:count], list(range(count)), [BLOCK] * count
            for what, work, beside in (
                ("save", partial(coded.save, ids, slots, tokens), partial(plain.save, ids, slots)),
                ("load", partial(coded.load, slots, ids, tokens), partial(plain.load, slots, ids)),
            ):
                taken, other = seconds_of(work, repeats), seconds_of(beside, repeats)
                calls = seconds_of_calls(work)
                row = {
                    "what": what, "kind": spec, "raw_mib": mib, "ratio": round(block_bytes / codec.slot_bytes, 3),
                    "ms": round(taken * 1e3, 3), "gb_s": round(count * block_bytes / taken / 1e9, 1),
                    "plain_ms": round(other * 1e3, 3), "of_plain": round(taken / other, 3),
                    "call_ms": round(calls * 1e3, 3), "plain_call_ms": round(seconds_of_calls(beside) * 1e3, 3),
                    "repeats": repeats,
                }  # fmt: skip
                found.append(row)
                print(*(f"{key}={value}" for key, value in row.items()), flush=True)
        coded.close()
    return found


def seconds_of_calls(work: object) -> float:
    """Of the calling thread alone, the GPU idle."""
    taken = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()  # type: ignore[operator]
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="of the check")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--mib", type=lambda text: [int(one) for one in text.split(",")], default=[14, 64, 448, 860])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=Path, help="CSV to append to")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU")
    print(f"{sum(check(seed) for seed in range(args.rounds))} copies end as the twin's", flush=True)
    if not args.check_only:
        found = rows(args.mib, args.repeats)
        if args.rows:
            append_rows(args.rows, found)


if __name__ == "__main__":
    main()
