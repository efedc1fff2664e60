"""Pages about connectors beside each other: in the judge's traps, and after a restart of the server."""

from collections.abc import Sequence

from measured.pages import Goal, Page, Row, Table, num, percent, read

OURS = "kvlab"
FIRST = "edges"


def judge() -> Page:
    rows = read("judge.csv")
    connectors = list(dict.fromkeys(row["connector"] for row in rows))
    traps = list(
        dict.fromkeys(row["trap"] for row in sorted(rows, key=lambda row: not row["connector"].startswith(OURS)))
    )

    def of(connector: str, trap: str) -> list[Row]:
        return [row for row in rows if (row["connector"], row["trap"]) == (connector, trap)]

    def cell(connector: str, trap: str) -> str:
        started = any(row["verdict"] != "refused" for row in of(connector, FIRST))
        found = of(connector, trap) or (
            [] if started else of(connector, FIRST)
        )  # one that does not start is asked once
        verdicts = list(dict.fromkeys(row["verdict"] for row in found))
        return " / ".join(each if each in ("held", "not run", "refused") else f"**{each}**" for each in verdicts)

    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] not in ("held", "not run"):
            names = reasons.setdefault((row["connector"], row["verdict"], row["why"]), [])
            names += [] if row["trap"] in names else [row["trap"]]
    ours = [row for row in rows if row["connector"].startswith(OURS) and row["verdict"] != "not run"]
    held = sum(row["verdict"] == "held" for row in ours)
    equal = all(len({row["verdict"] for row in of(c, trap)}) < 2 for c in connectors for trap in traps)
    once = [c for c in connectors if len({row["run"] for row in of(c, FIRST)}) < 2]
    said = ("each verdict" if equal else "some differ") + (f"; one run of {', '.join(once)}" if once else "")
    return Page(
        "judge",
        "Is a hit of a vLLM connector a recompute?",
        f"kvlab: {held} of {len(ours)} verdicts are *held*. The others are judged by the same command; what does not start on a CPU says so.",
        [
            Table(
                "Verdicts of `kvlab judge`, on a CPU where no GPU is named",
                ["trap", *connectors],
                [[trap, *(cell(connector, trap) for connector in connectors)] for trap in traps],
                rows,
                "*held*: every answer is that of an engine without a connector. *no hits*: right, and nothing was loaded. *refused*: the engine does not start with it here. *not run*: the trap needs a folder of the "
                "connector's. Two verdicts in a cell are of two runs that differ.",
            ),
            Table(
                "Why not held",
                ["connector", "traps", "verdict", "first of what was found, or the line printed"],
                [[c, "all" if set(names) == {FIRST} and v == "refused" else ", ".join(names), v, w.replace("|", "\\|")] for (c, v, w), names in reasons.items()],
                [row for row in rows if row["verdict"] not in ("held", "not run")],
            ),
        ],
        [
            Goal("kvlab holds in every trap", f"{held} of {len(ours)}", held == len(ours)),
            Goal("two runs give the same verdicts", said, equal and not once),
        ],
        "[Judge a connector](../guide/judge.md) says what is compared and how. ExampleConnector is vLLM's example for those who write a connector, and says of itself that it is for debugging; it has no `reset_cache`, and "
        "vLLM answers `True` for it. OffloadingConnector, SimpleCPUOffloadConnector and LMCache are made for GPUs: a table of theirs needs one. On a GPU the traps with LoRA are left out, as vLLM has no kernels for it in float32 there. With LMCache's multi-process connector vLLM for CPUs ends in its own kernel dispatcher, at an object of llvmlite, which LMCache imports.",
        ["judge.csv"],
    )  # fmt: skip


def restart() -> Page:
    rows = read("serving_restart_cpu.jsonl")
    names = list(dict.fromkeys(row["backend"] for row in rows))

    def of(name: str) -> Sequence[Row]:
        return sorted((row for row in rows if row["backend"] == name), key=lambda row: int(row["run"]))

    def hit(row: Row) -> float:
        return float(row["hit_tokens"]) / float(row["total_input_tokens"])

    kept = [name for name in names if hit(of(name)[-1]) > 0]
    cells = []
    for name in names:
        first, last = of(name)[0], of(name)[-1]
        faster = 1 - last["mean_ttft_ms"] / first["mean_ttft_ms"]
        cells.append(
            [name, num(first["mean_ttft_ms"], 1), num(last["mean_ttft_ms"], 1), percent(faster), num(last["median_ttft_ms"], 1),
             percent(hit(last)), percent(last["same_texts"]), num(last["server_start_s"], 1)]
        )  # fmt: skip
    return Page(
        "restart",
        "What is found after the server is started again?",
        f"After a restart, {', '.join(kept)} serve {percent(min(hit(of(name)[-1]) for name in kept))} of the prompts' tokens or more; a tier in the engine's own memory is gone with it.",
        [
            Table(
                "TTFT of the same prompts, before and after a restart of the server",
                ["backend", "TTFT before, ms", "TTFT after, ms", "less", "median after, ms", "hit tokens after", "same answers", "start of the second server, s"],
                cells,
                rows,
                "The demo model on a CPU. Every server is warmed up by other prompts before each run. Times are of a busy machine; hits are not.",
            )
        ],
        [Goal("files, a Redis and `kvlab serve` outlive the engine", ", ".join(kept), {"kvlab-disk", "kvlab-redis", "kvlab-serve"} <= set(kept))],
        "`kvlab bench --restart`: [serving benchmarks](../guide/benchmark.md#after-a-restart). `vllm-fs` and `lmcache-mp` need a GPU.",
        ["serving_restart_cpu.jsonl"],
    )  # fmt: skip


PAGES = (judge, restart)
