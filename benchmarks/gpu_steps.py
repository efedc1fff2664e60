"""What does the connector cost requests that hit nothing, and what do hits bring, under load? One engine, taking turns.

    python benchmarks/gpu_steps.py MODEL [--rounds 40] [--secondary URL] [--compilation-config JSON]

Machines drift by more than the cost that is looked for, so nothing is compared across processes: the same engine runs
the same workload with its connector's hooks taken out (*off*), with new prompts (*first*: each is saved),
and with these again (*second*: each is loaded), round after round, every other round with *off* last. With a lower
tier, once more after the memory tier was emptied (*lower*: loaded or computed, as the admission decides). A request is
added every few steps, so that prompts are computed beside others that decode, and by steps, not by the clock: the turns
of a round hold the same batches. Medians of the rounds' means, and of the ratios to *off* within a round with their 95%
interval (bootstrap over rounds). `step_cpu_ms` is the processor time that the engine's thread took for a step: where
gaps grow and it does not, the thread was kept waiting. `others_cpu` is the processor time of all other threads of the
engine's process beside that of its own, which would be those that read, write and check for a tier.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path

EVERY = 8  # steps between two requests: at 7 ms a step about 17 a second
OUTPUT_LEN = 90
LENGTHS = (20, 60, 120, 250, 400, 800)  # about the spread of ShareGPT's prompts


def prompts(count, seed):
    rng = random.Random(seed)
    return [[rng.randrange(1000, 40000) for _ in range(rng.choice(LENGTHS))] for _ in range(count)]


class Driver:
    def __init__(self, engine, sampling):
        self._engine = engine
        self._sampling = sampling
        self._num_requests = 0

    def run(self, waiting):
        """Means of TTFT and of the gaps between tokens, in ms, and the gaps' median and p99, and a step's CPU time."""
        added, last, ttfts, gaps, step = {}, {}, [], [], 0
        cpu, others = time.thread_time(), others_cpu_s()
        waiting = list(waiting)
        while waiting or self._engine.has_unfinished_requests():
            if waiting and step % EVERY == 0:
                self._num_requests += 1
                name = str(self._num_requests)
                added[name] = time.perf_counter()
                self._engine.add_request(name, {"prompt_token_ids": waiting.pop()}, self._sampling)
            step += 1
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                name = output.request_id
                if not output.outputs[0].token_ids:
                    continue
                if name in last:
                    gaps.append((now - last[name]) * 1e3)
                else:
                    ttfts.append((now - added[name]) * 1e3)
                last[name] = now
        percentiles = statistics.quantiles(gaps, n=100)
        return {
            "ttft_ms": statistics.mean(ttfts), "gap_ms": statistics.mean(gaps),
            "gap_p50_ms": percentiles[49], "gap_p99_ms": percentiles[98],
            "step_cpu_ms": (time.thread_time() - cpu) * 1e3 / step,
            "others_cpu": (others_cpu_s() - others) / (time.thread_time() - cpu),
        }  # fmt: skip


def others_cpu_s():
    """Processor time of this process's threads but the calling one; those that have ended are not counted."""
    ticks, own = 0, threading.get_native_id()
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != own:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def interval(ratios):
    """95% interval of their median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000))
    return medians[25], medians[974]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=25, help="in each turn")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--compilation-config", type=json.loads, default=None, help="vLLM's, as JSON")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--secondary", help="URL of a tier below memory, to which everything is saved as well")
    parser.add_argument("--size", default="16GiB", help="of the memory tier; must hold all rounds")
    parser.add_argument("--serde", default="naive", help="of the memory tier")
    parser.add_argument("--rows", type=Path, default=Path("data/measured/gpu_steps.csv"))
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    import kvlab
    from kvlab.machine.provenance import append_rows

    memory = f"memory://?size={options.size}&serde={options.serde}"
    tiers = [memory, *([options.secondary] if options.secondary else [])]
    connector = KVTransferConfig(**kvlab.vllm_config(tiers, report=True))
    extra = {"compilation_config": options.compilation_config} if options.compilation_config else {}
    llm = LLM(
        options.model,
        load_format=options.load_format,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=8192,  # the server's default
        gpu_memory_utilization=0.7,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        kv_transfer_config=connector,
        **extra,
    )
    core = llm.llm_engine.engine_core.engine_core
    worker, scheduler = get_kv_transfer_group(), core.scheduler.connector.scheduler
    hooks = core.model_executor.driver_worker.worker.model_runner.kv_connector
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True, detokenize=False)
    driver = Driver(llm.llm_engine, sampling)

    def off(is_off):
        scheduler.enabled = not is_off
        hooks.set_disabled(is_off)

    driver.run(prompts(options.requests, 0))  # warm
    served = ["first", "second", *(["lower"] if options.secondary else [])]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ("off", *served)}
    for at in range(options.rounds):
        fresh = prompts(options.requests, 1 + at)
        for name in ("off", *served) if at % 2 == 0 else (*served, "off"):
            off(name == "off")
            if name == "lower":
                scheduler.index.clear()
            turns[name].append(driver.run(fresh))
            while worker.tiers is not None and worker.tiers.has_waiting:  # what is left must not fall to the next turn
                worker.tiers.wait(0.01)
        print(at, *(f"{name} {done[-1]['ttft_ms']:.1f} {done[-1]['gap_ms']:.2f}" for name, done in turns.items()))
    rows = []
    for name, done in turns.items():
        row = {"turn": name, "rounds": options.rounds, "requests": options.requests, "every": EVERY}
        row["serde"] = options.serde
        row["lower"] = options.secondary.partition(":")[0] if options.secondary else ""
        for what in done[0]:
            row[what] = round(statistics.median(one[what] for one in done), 3)
            ratios = [one[what] / (base[what] or 1e-9) for one, base in zip(done, turns["off"], strict=True)]
            row[f"{what}_over_off"] = round(statistics.median(ratios), 4)
            row[f"{what}_low"], row[f"{what}_high"] = (round(bound, 4) for bound in interval(ratios))
        rows.append(row)
        print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    print(dict(scheduler.counters), worker.hook_errors)
    append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
