"""TTFT of a hit by prompt length: recompute, vLLM's own prefix cache (the floor), kvlab, and peers.

    python benchmarks/gpu_ttft.py MODEL --backend kvlab [--rows data/measured/gpu_ttft.csv]

One request at a time, one new token, random token ids, weights may be random (`--load-format dummy`): only shapes
matter here. One backend per process; run them one after the other on the same machine. Medians with the spread.
`same_tokens` is the share of hits that answer what the prompt was answered when it was computed: 1 but for rounding
where KV was loaded, and by chance only where a backend claims hits and loads nothing.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path

from kvlab.bench.provenance import append_rows

LENGTHS = (776, 2048, 8192, 15000)
BACKENDS = ("none", "vllm-prefix", "kvlab", "lmcache", "vllm-offload")


def transfer_config(backend: str):
    from vllm.config import KVTransferConfig

    import kvlab

    if backend.startswith("kvlab"):
        return KVTransferConfig(**kvlab.vllm_config(["memory://?size=16GiB"], report=True))
    if backend == "lmcache":
        os.environ |= {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "16", "LMCACHE_CHUNK_SIZE": "256"}
        return KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    if backend == "vllm-offload":
        extra = {"cpu_bytes_to_use": 16 << 30}
        return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    return None


def start(model: str, backend: str, load_format: str, graphs: str):
    """An engine in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    return LLM(
        model,
        load_format=load_format,
        enforce_eager=graphs == "none",
        compilation_config={"cudagraph_mode": "PIECEWISE"} if graphs == "piecewise" else None,
        max_model_len=16384,
        gpu_memory_utilization=0.8,
        # vLLM's offloading works behind its prefix cache; that one is emptied before each repeat instead.
        enable_prefix_caching=backend in ("vllm-prefix", "vllm-offload"),
        skip_tokenizer_init=True,
        kv_transfer_config=transfer_config(backend),
    )


def arguments(rows: str, repeats: int) -> argparse.Namespace:
    """The command line of this benchmark and of gpu_ttft_profile.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--graphs", choices=["none", "piecewise", "full"], default="none", help="CUDA graphs")
    parser.add_argument("--rows", type=Path, default=Path("data/measured") / rows)
    return parser.parse_args()


def main() -> None:
    options = arguments("gpu_ttft.csv", 20)
    backend = options.backend
    llm = start(options.model, backend, options.load_format, options.graphs)
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    rng = random.Random(0)

    def ask(ids: list[int]) -> tuple[float, int]:
        """Milliseconds, and the token."""
        if backend == "vllm-offload":
            llm.reset_prefix_cache()
        start = time.perf_counter()
        answer = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        return (time.perf_counter() - start) * 1e3, answer[0].outputs[0].token_ids[0]

    def loaded() -> tuple[float, float]:
        """Bytes and seconds of kvlab's loads so far, as far as their ends have been seen."""
        connector = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "connector", None)
        counters = connector.scheduler.counters if backend == "kvlab" else {}
        return counters.get("loaded_bytes", 0), counters.get("load_seconds", 0.0)

    rows = []
    for length in LENGTHS:
        prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(4)]
        computed = [ask(ids)[1] for ids in prompts]
        time.sleep(1.0)
        for _ in range(3):
            ask(prompts[-1])
        before = loaded()
        asked = [ask(prompts[i % 4]) for i in range(options.repeats)]
        times = [milliseconds for milliseconds, _ in asked]
        same = [token == computed[i % 4] for i, (_, token) in enumerate(asked)]
        num_bytes, seconds = (after - had for after, had in zip(loaded(), before, strict=True))
        row = {
            "backend": backend, "tokens": length, "ttft_ms_median": round(statistics.median(times), 2),
            "ttft_ms_min": round(min(times), 2), "ttft_ms_max": round(max(times), 2), "repeats": options.repeats,
            "graphs": options.graphs, "same_tokens": round(statistics.mean(same), 3),
            "load_gb_per_s": round(num_bytes / seconds / 1e9, 2) if seconds else "",
        }  # fmt: skip
        rows.append(row)
        print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    append_rows(options.rows, rows)
    if backend.startswith("kvlab"):
        connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
        print(dict(connector.scheduler.counters), connector.hook_errors, flush=True)


if __name__ == "__main__":
    main()
