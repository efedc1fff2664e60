"""Pages about right answers: connectors in traps, faults in what they store, and the simulator beside the engine."""

from measured.pages import Goal, Page, Row, Table, num, pivot, read

OURS = "kvlab"


def judge() -> Page:
    rows = read("judge.csv")
    connectors = list(dict.fromkeys(row["connector"] for row in rows))

    def of(connector: str, trap: str) -> list[Row]:
        return [row for row in rows if (row["connector"], row["trap"]) == (connector, trap)]

    def verdicts(row: Row) -> str:
        found = list(dict.fromkeys(one["verdict"] for one in of(row["connector"], row["trap"])))
        return " / ".join(each if each == "held" else f"**{each}**" for each in found)

    head, cells = pivot(rows, "trap", "connector", verdicts, connectors)
    bad = {(row["connector"], row["trap"]): row for row in rows if row["verdict"] not in ("held", "not run")}
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for (connector, trap), row in bad.items():
        reasons.setdefault((connector, row["verdict"], row["why"].replace("|", "\\|")), []).append(trap)
    why = [
        [c, ", ".join(traps) if len(traps) < 8 else f"{len(traps)} traps", v, w] for (c, v, w), traps in reasons.items()
    ]
    ours = [row for row in rows if row["connector"].startswith(OURS)]
    held = sum(row["verdict"] == "held" for row in ours)
    judged = sum(row["verdict"] != "not run" for row in ours)
    runs = min(len(of(connector, "edges")) for connector in connectors)
    chaos = read("chaos.csv")
    kinds = ("delay", "drop", "truncate", "flip", "swap", "replay")
    return Page(
        "judge",
        "Is a hit of a vLLM connector a recompute?",
        f"kvlab: {held} of {judged} traps held. The others are judged with the same command; what refuses a CPU says so.",
        [
            Table(
                "Verdicts of `kvlab judge`",
                head,
                cells,
                rows,
                f"{runs} runs each; two verdicts in a cell are of runs that differ. *held*: every answer is that of an engine without a connector; *no hits*: "
                "right, and nothing was loaded; *refused*: the engine does not start with it here. A trap without a storage folder of the connector's is not run.",
            ),
            Table("Why not held", ["connector", "traps", "verdict", "first of what was found, or the line printed"], why, list(bad.values()) or rows),
            Table(
                "Wrong answers per 1,000 faults in what is stored",
                ["cache", "faults", "requests", "tokens loaded", "wrong answers", "per 1,000 faults", *kinds, "the engine ended with"],
                [
                    [row["cache"], num(row["faults"], 0), num(row["requests"], 0), num(row["loaded_tokens"], 0), row["wrong"],
                     row["wrong_per_1000_faults"], *(row[kind] for kind in kinds), row["ended"]]
                    for row in chaos
                ],
                chaos,
                "No memory tier, so that each hit reads what is stored. The faults are those of `kvlab chaos`; a cache whose engine ends sees no more of them.",
            ),
        ],
        [
            Goal("kvlab holds in every trap that runs on a CPU", f"{held} of {judged}", held == judged),
            Goal(
                "no wrong answer of kvlab",
                ", ".join(f"{row['wrong']} at {row['faults']} faults ({row['cache']})" for row in chaos if row["cache"].startswith(OURS)),
                all(row["wrong"] == "0" and not row["ended"] for row in chaos if row["cache"].startswith(OURS)),
            ),
        ],
        "[Judge a connector](../guide/judge.md) says what is compared and how. ExampleConnector is vLLM's example for those who write one, and says of itself that it is for debugging.",
        ["judge.csv", "chaos.csv"],
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
        "The simulator replays a stack of stores as `CacheEngine` uses it, where a prompt renews what it finds in every tier. vLLM's connector asks secondary tiers for nothing that it holds in memory, so that a "
        "disk which evicts has another order; and its memory tier touches the objects of a hit once, not twice, which `arc` counts. `tests/simulation/test_simulate_vllm.py` replays a part of these runs in every run of the suite.",
        ["simulator_error.csv"],
    )  # fmt: skip


PAGES = (judge, simulator_error)
