"""Which eviction policy keeps the right blocks? Hit rates of every policy on public request traces, at many sizes.

    KVLAB_TRACES=DIR python benchmarks/eviction.py

Every access is a block of 512 tokens; hits are counted per block. Rows go to data/measured/eviction.csv.
"""

import json
from pathlib import Path

from kvlab.machine.provenance import provenance, write_rows
from kvlab.simulation.trace_files import find_traces
from kvlab.stores.eviction import POLICIES, get_policy

ROOT = Path(__file__).resolve().parents[1]
SIZES = [1000, 3000, 10_000, 30_000, 100_000]


def hit_rate(name: str, accesses: list[int], capacity: int) -> float:
    policy, held, hits = get_policy(name), set(), 0
    for key in accesses:
        if key in held:
            hits += 1
            policy.touch(key)
            continue
        if len(held) == capacity:
            leaving = policy.victim()
            held.remove(leaving)
            policy.discard(leaving)
        held.add(key)
        policy.admit(key, 1)
    return hits / len(accesses)


def main() -> None:
    found = find_traces()
    shared = provenance(("kvlab",))
    rows = []
    for trace in ("conversation", "synthetic"):
        with open(found[f"mooncake_{trace}_trace"]) as file:
            accesses = [key for line in file for key in json.loads(line)["hash_ids"]]
        best = 1 - len(set(accesses)) / len(accesses)
        for name in POLICIES:
            for capacity in SIZES:
                row = {
                    "trace": trace,
                    "policy": name,
                    "blocks": capacity,
                    "hit_rate": hit_rate(name, accesses, capacity),
                }
                rows.append({**row, "hit_rate_unbounded": best, "accesses": len(accesses), **shared})
            print(trace, name, [f"{row['hit_rate']:.4f}" for row in rows[-len(SIZES) :]], flush=True)
    write_rows(ROOT / "data" / "measured" / "eviction.csv", rows)


if __name__ == "__main__":
    main()
