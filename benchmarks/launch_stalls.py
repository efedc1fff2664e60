"""What does writing saved objects back to a secondary tier cost the thread that launches the engine's steps?

    python benchmarks/launch_stalls.py --secondary redis://127.0.0.1:6379 [--rows FILE]

The main thread stands in for an engine whose prefills are bound by launching: thousands of short calls that each let
go of the GIL, as launches do. Every eighth step computes a prompt (275 tokens of Qwen2.5-7B: objects of 16, 1
and 1 blocks) and saves it through the connector's worker; the others replay one graph. A step's output is handled while
the next one runs, as in vLLM. Told: a prompt's time from the beginning of its step to its output, and by how much it is
above that of the same prompt of a turn in which nothing is written back: medians and quartiles. The worker writes when
the copy has ended (`at once`), or waits for steps that only decode, as it does (`waits`).
"""

import argparse
import os
import statistics
import time
from itertools import count
from pathlib import Path

import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.messages import SaveOp, StepMetadata
from kvlab.connectors.vllm.worker.worker import Worker
from kvlab.connectors.vllm.worker.write_back import MAX_DELAY_S
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.machine.provenance import append_rows
from kvlab.paged import page_layout
from kvlab.paged.cpu import CPUTransfer
from kvlab.stores import open_store

LAYERS, PAGE = 28, 32768
OBJECTS = (16, 1, 1)  # blocks of each
PROMPTS_HELD = 4
PROMPTS_PER_TURN = 5
EVERY = 8
PREFILL_CALLS, DECODE_CALLS, OUTPUT_CALLS = 6000, 200, 300
DECODE_S, TAIL_S, COPY_S = 4.5e-3, 0.5e-3, 0.3e-3  # on the GPU: a step, what a prefill computes once launched, a save


class Arena(CPUTransfer):
    """Host memory whose copies cost the main thread nothing and have ended at `ready`."""

    ready = 0.0

    def save(self, block_ids, slots):
        return None

    def slots(self, slots):
        time.sleep(max(self.ready - time.perf_counter(), 0))
        return super().slots(slots)


def launch(calls):
    small, sum_ = torch.zeros(16), torch.zeros(16)
    for _ in range(calls):
        torch.add(small, small, out=sum_)


class Engine:
    def __init__(self, worker, *, writes):
        self._worker = worker
        self._writes = writes
        self._pending = None  # (when the previous step's GPU work ends, when it began if it computes a prompt)
        self._num_prompts = 0
        self._generations = count(1)

    def turn(self):
        """Milliseconds of some prompts; nothing is left to write back."""
        done = [self._step(is_prompt=at % EVERY == 0) for at in range(PROMPTS_PER_TURN * EVERY)]
        self._worker.write_back.flush()
        self._pending = None
        return [ms for ms in done if ms is not None]

    def _step(self, *, is_prompt):
        """Launch a step, then handle the previous one's output. Milliseconds of the prompt whose output that was."""
        began = time.perf_counter()
        metadata = StepMetadata(num_tokens=275 if is_prompt else 8, prefill_tokens=275 if is_prompt else 0)
        self._worker.begin(metadata)
        launch(PREFILL_CALLS if is_prompt else DECODE_CALLS)
        launched = time.perf_counter()
        before = self._pending[0] if self._pending else 0.0
        ends = max(launched, before) + (TAIL_S if is_prompt else DECODE_S)
        if is_prompt:
            self._worker.transfer.ready = ends + COPY_S
            metadata.saves = self._saves()
        self._worker.save(metadata)
        pending, self._pending = self._pending, (ends, began if is_prompt else None)
        if pending is None:
            return None
        time.sleep(max(pending[0] - time.perf_counter(), 0))
        launch(OUTPUT_CALLS)
        return None if pending[1] is None else (time.perf_counter() - pending[1]) * 1e3

    def _saves(self):
        at = self._num_prompts % PROMPTS_HELD * sum(OBJECTS)
        self._num_prompts += 1
        saves = []
        for blocks in OBJECTS:
            slots, pages = tuple(range(at, at + blocks)), tuple(range(blocks))
            saves.append(SaveOp(os.urandom(16), next(self._generations), slots, pages, 0, 256, self._writes))
            at += blocks
        return saves


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--secondary", required=True, help="URL of the tier")
    parser.add_argument("--prompts", type=int, default=150, help="in each way")
    parser.add_argument("--rows", type=Path, default=Path("data/measured/launch_stalls.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    caches = {f"layer.{i}": torch.zeros(1, PAGE, dtype=torch.uint8) for i in range(LAYERS)}
    layout = page_layout(caches, num_blocks=1, page_bytes=dict.fromkeys(caches, PAGE), name="NHD")
    num_slots = PROMPTS_HELD * sum(OBJECTS)
    store = CacheEngine(open_store(options.secondary), namespace=Namespace("bench"), chunker=Chunker(256, 16))
    ways = {}
    for name, delay_s in (("not at all", 0.0), ("at once", 0.0), ("waits", MAX_DELAY_S)):
        arena = Arena(layout, num_slots)
        arena.arena.random_()
        ways[name] = Engine(Worker(arena, num_slots, store, max_write_delay_s=delay_s), writes=name != "not at all")
    times: dict[str, list[float]] = {name: [] for name in ways}
    while len(times["waits"]) < options.prompts:
        for name, engine in ways.items():
            times[name] += engine.turn()
    rows = []
    for name in ways:
        added = [ms - base for ms, base in zip(times[name], times["not at all"], strict=True)]
        quartiles = statistics.quantiles(added, n=4)
        row = {"lower": options.secondary.partition(":")[0], "writes": name, "prompts": len(times[name])}
        row |= {"prompt_ms": round(statistics.median(times[name]), 3), "added_ms": round(statistics.median(added), 3)}
        rows.append(row | {"added_q1_ms": round(quartiles[0], 3), "added_q3_ms": round(quartiles[2], 3)})
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    append_rows(options.rows, rows, packages=("torch", "xxhash"))


if __name__ == "__main__":
    main()
