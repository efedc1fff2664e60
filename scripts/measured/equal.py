"""Pages about what must be equal: answers where what is stored is damaged, and the simulator beside the engine."""

from measured.pages import Goal, Page, Table, num, read


def chaos() -> Page:
    rows = read("chaos.csv")
    ours = [row for row in rows if row["cache"].startswith("kvlab")]
    kinds = ("delay", "drop", "truncate", "flip", "swap", "replay")
    wrong, faults = (sum(int(row[name]) for row in ours) for name in ("wrong", "faults"))
    return Page(
        "chaos",
        "How many answers are wrong when what is stored is damaged?",
        f"kvlab: {wrong} at {faults:,} faults, while {sum(int(row['loaded_tokens']) for row in ours):,} tokens were loaded.",
        [
            Table(
                "Wrong answers of vLLM per 1,000 faults in what its cache stores",
                ["cache", "faults", "requests", "tokens loaded", "wrong answers", "per 1,000 faults", *kinds, "the engine ended with"],
                [
                    [row["cache"], *(num(row[name], 0) for name in ("faults", "requests", "loaded_tokens", "wrong")),
                     row["wrong_per_1000_faults"], *(row[kind] for kind in kinds), row["ended"].replace("|", "\\|")]
                    for row in rows
                ],
                rows,
                "A small random model on the CPU; no memory tier, so that each hit reads what is stored. The faults are those of `kvlab chaos`. A cache whose engine ends sees no more of them. "
                "ExampleConnector is vLLM's example for those who write a connector.",
            )
        ],
        [Goal("no wrong answer of kvlab, and no engine that ends", f"{wrong} at {faults:,} faults", not wrong and not any(row["ended"] for row in ours))],
        files=["chaos.csv"],
    )  # fmt: skip


def simulator_error() -> Page:
    rows = read("simulator_error.csv")
    tiers = ("memory", "disk")
    off = sum(abs(int(row[f"{tier}_difference"])) for row in rows for tier in tiers)
    counted = sum(int(row[f"{tier}_engine"]) for row in rows for tier in tiers)
    return Page(
        "simulator_error",
        "By how much is the simulator wrong?",
        f"{off:,} of {counted:,} hit tokens, over {len(rows)} runs of vLLM with kvlab's tiers.",
        [
            Table(
                "Hit tokens by tier, counted in the engine and simulated",
                ["traffic", "policy", "tokens of an object", "requests", "blocks in memory", "objects on disk",
                 *(f"{tier}, {what}" for tier in tiers for what in ("engine", "simulator", "difference"))],
                [
                    [row["traffic"], row["policy"], row["chunk_tokens"], row["requests"], row["memory_blocks"], row["disk_objects"] or "all",
                     *(num(row[f"{tier}_{what}"], 0) for tier in tiers for what in ("engine", "simulated", "difference"))]
                    for row in rows
                ],
                rows,
                "A small random model; requests come one after the other, and what is written to disk has ended before the next. Both tiers evict where the disk does not hold all.",
            )
        ],
        [Goal("0 in every tier", f"{off:,} tokens", off == 0)],
        "`simulate(..., connector=True)` replays the order in which vLLM's connector uses its tiers. Without it the simulator replays a stack of stores as `CacheEngine` uses it, where a prompt renews what it finds in "
        "every tier. `tests/simulation/test_simulate_vllm.py` replays a part of these runs in every run of the suite.",
        ["simulator_error.csv"],
    )  # fmt: skip


PAGES = (chaos, simulator_error)
