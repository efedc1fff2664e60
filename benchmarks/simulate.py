"""How fast is the simulator, and what does it say of public traces?

    KVLAB_TRACES=DIR python benchmarks/simulate.py

Speed: block accesses per second of CPU time, of one process, for every policy; the ceiling is the same traffic through
the same loop with no policy at all (an unbounded dict). Medians over repeats. Then the sweep of 5 policies at 8
capacities, in wall-clock seconds on all cores. Without KVLAB_TRACES it runs on made-up traffic. Rows go to
data/measured/.
"""

import os
import statistics
import time
from pathlib import Path

from kvlab.machine.provenance import provenance, write_rows
from kvlab.simulation.belady import belady
from kvlab.simulation.generate import generate_traffic
from kvlab.simulation.replay import cut, find, replay
from kvlab.simulation.simulate import simulate
from kvlab.simulation.sweep import sweep
from kvlab.simulation.trace_files import load_traffic
from kvlab.stores.eviction import POLICIES, get_policy

MEASURED = Path(__file__).resolve().parents[1] / "data" / "measured"
REPEATS = 5
CAPACITIES = [1000, 2000, 5000, 10_000, 20_000, 30_000, 50_000, 100_000]
SWEPT = ["lru", "fifo", "s3fifo", "arc", "belady"]


def unbounded(objects):
    """The loop without a policy."""
    held = {}
    for ids, keys in zip(objects.block_ids, objects.keys, strict=True):
        find(ids, keys, objects.step, held)
        for key in [key for key in keys if key not in held]:
            held[key] = 1


def cpu_seconds(work):
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main():
    folder = os.environ.get("KVLAB_TRACES")
    traces = [load_traffic(path) for path in sorted(Path(folder).glob("*.jsonl"))] if folder else []
    traces = traces or [generate_traffic("chat", 20_000, reuse=0.6, block_tokens=64)]
    shared = provenance(("kvlab", "numpy"))
    speed, rates = [], []
    for traffic in traces:
        objects, accesses = cut(traffic, traffic.block_tokens), int(traffic.num_blocks.sum())
        ceiling = accesses / cpu_seconds(lambda objects=objects: unbounded(objects))
        for capacity in (10_000, 30_000):
            for name in POLICIES:
                work = lambda: replay(objects, get_policy(name), capacity, [0, 1])  # noqa: E731
                per_s = accesses / cpu_seconds(work)
                row = {"traffic": traffic.name, "what": name, "blocks": capacity, "accesses_per_cpu_s": round(per_s)}
                speed.append({**row, "of_no_policy": round(per_s / ceiling, 3), "repeats": REPEATS, **shared})
                print(
                    traffic.name,
                    name,
                    capacity,
                    f"{per_s / 1e6:.2f} M/s, {per_s / ceiling:.2f} of no policy",
                    flush=True,
                )
            per_s = accesses / cpu_seconds(lambda: belady(traffic, capacity))
            row = {"traffic": traffic.name, "what": "belady", "blocks": capacity, "accesses_per_cpu_s": round(per_s)}
            speed.append({**row, "of_no_policy": round(per_s / ceiling, 3), "repeats": REPEATS, **shared})
        walls = []
        for _ in range(3):
            start = time.perf_counter()
            rows = sweep(traffic, [f"{n} blocks" for n in CAPACITIES], SWEPT, progress=False)
            walls.append(time.perf_counter() - start)
        wall = statistics.median(walls)
        row = {
            "traffic": traffic.name,
            "what": f"sweep of {len(rows)}: {' '.join(SWEPT)}",
            "sweep_wall_s": round(wall, 2),
        }
        speed.append({**row, "repeats": 3, **shared})
        print(
            traffic.name, f"sweep of {len(rows)} runs: {wall:.1f} s (all: {[round(w, 1) for w in walls]})", flush=True
        )
        rows.append(simulate(traffic).row)
        rows += sweep(traffic, [f"{n} blocks" for n in CAPACITIES], ["lfu", "mru"], progress=False)
        rows += sweep(traffic, [f"{n} blocks" for n in CAPACITIES], ["lru"], admission=2, progress=False)
        kept = (
            "traffic",
            "policy",
            "capacity",
            "store_threshold",
            "block_hit_rate",
            "token_hit_rate",
            "request_hit_rate",
            "evictions",
        )
        rates += [{**{name: row[name] for name in kept}, **shared} for row in rows]
    write_rows(MEASURED / "simulate_speed.csv", speed)
    write_rows(MEASURED / "simulate_rates.csv", rates)


if __name__ == "__main__":
    main()
