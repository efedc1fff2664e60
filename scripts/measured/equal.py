"""Pages about what must be equal: the simulator beside the engine."""

from measured.pages import Goal, Page, Table, num, read


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


PAGES = (simulator_error,)
