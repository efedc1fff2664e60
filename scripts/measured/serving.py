"""The page of serving runs on GPUs: backends side by side, by workload."""

from measured.pages import Goal, Page, Row, Table, num, percent, read

FILES = {
    "Caches in host memory, full CUDA graphs": ("serving_sharegpt_h200.jsonl", "serving_rounds_h200.jsonl", "serving_documents_h200.jsonl"),
    "Caches in host memory, graphs in pieces": ("serving_memory_h200_piecewise.jsonl",),
    "Disk, graphs in pieces": ("serving_disk_h200_piecewise.jsonl",),
    "Redis, graphs in pieces": ("serving_redis_h200_piecewise.jsonl",),
}  # fmt: skip
HEAD = (
    "backend",
    "TTFT 1st",
    "2nd",
    "p99 1st",
    "2nd",
    "TPOT 1st",
    "2nd",
    "gap 2nd",
    "hit in 2nd",
    "of these loaded",
    "gap closed",
)


def serving() -> Page:
    groups = {title: [row for name in names for row in read(name)] for title, names in FILES.items()}
    tables, goals = [], []
    for title, rows in groups.items():
        for dataset in dict.fromkeys(row["dataset"] for row in rows):
            of = [row for row in rows if row["dataset"] == dataset]
            pairs = _pairs(of)
            tables.append(Table(f"{title}: {dataset}", HEAD, [_cells(name, pairs) for name in pairs], of, _about(of)))
            goals.append(_goal(title, dataset, pairs))
    return Page(
        "serving",
        "When is a cache worth it under load?",
        f"From host memory wherever prompts come again; from a disk or Redis only where these are faster than the GPU computes. {sum(goal.met for goal in goals)} of {len(goals)} comparisons meet their goal.",
        tables,
        goals,
        """
- Times are ms; 1st and 2nd are two runs of the same prompts on one server. A value in brackets was measured while other work ran on the machine (`disturbed` in its row).
- *Gap closed* is (N - x) / (N - F): N and F are the mean TTFT of the last runs of `none` and `vllm-prefix`, x the backend's.
- **Where hits are not loaded the row is no result**, however fast: the engine computes the last token over whatever lies in the pages. [Why LMCache loads nothing](../guide/benchmark.md#traps-and-what-is-done-about-them) with full CUDA graphs.
- Hits in host memory beat vLLM's own prefix cache on short prompts: kvlab keeps prompts to their last token, so one is left to compute, a step that replays one full CUDA graph; whole pages leave up to 16.
- `OffloadingConnector` loads between steps, so a hit costs a step more than the load.
- With graphs in pieces the host decides: launching takes as long as computing. Where `none` differs by a third between its two runs, a smaller difference of another backend says nothing.
- A tier that is slower than the GPU computes is hardly loaded from: kvlab loads a hundredth to learn that, and computes the rest.
- Weights are random, in the model's shape; answers seldom end early, and equal answers prove nothing.
""",
        [name for names in FILES.values() for name in names],
    )  # fmt: skip


def _pairs(rows: list[Row]) -> dict[str, tuple[Row, Row]]:
    """First and last run of each backend."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["backend"], []).append(row)
    return {name: (runs[0], runs[-1]) for name, runs in found.items()}


def _loaded(row: Row) -> float | None:
    """The share of promised tokens that a backend's log says were loaded; None where it tells of none."""
    if row.get("loaded_tokens") is None or not row["hit_tokens"]:
        return None
    return float(min(row["loaded_tokens"] / row["hit_tokens"], 1.0))


def _closed(name: str, pairs: dict[str, tuple[Row, Row]]) -> float | None:
    if "vllm-prefix" not in pairs:
        return None
    none, floor, ours = (pairs[each][1]["mean_ttft_ms"] for each in ("none", "vllm-prefix", name))
    return float((none - ours) / (none - floor))


def _cells(name: str, pairs: dict[str, tuple[Row, Row]]) -> list[str]:
    first, last = pairs[name]
    closed, loaded = _closed(name, pairs), _loaded(last)

    def ms(row: Row, field: str, digits: int = 1) -> str:
        return f"({num(row[field], digits)})" if row.get("disturbed") else num(row[field], digits)

    return [
        name,
        ms(first, "mean_ttft_ms"),
        ms(last, "mean_ttft_ms"),
        ms(first, "p99_ttft_ms", 0),
        ms(last, "p99_ttft_ms", 0),
        ms(first, "mean_tpot_ms"),
        ms(last, "mean_tpot_ms"),
        ms(last, "median_itl_ms"),
        percent(last["hit_tokens"] / last["total_input_tokens"]),
        "" if loaded is None else percent(loaded),
        "" if closed is None else percent(closed),
    ]


def _about(rows: list[Row]) -> str:
    row = rows[0]
    return (
        f"{row['num_prompts']:,} prompts at {row['request_rate']:g} requests/s; {row['together']} servers side by side."
    )


def _goal(title: str, dataset: str, pairs: dict[str, tuple[Row, Row]]) -> Goal:
    """Second runs: in memory 90% of the gap and more of it than the others that load, with a lower p99; elsewhere
    below the other cache on the same tier."""
    if "vllm-prefix" in pairs:
        ours = _closed("kvlab-memory", pairs)
        others = [name for name in ("lmcache-cpu", "vllm-offload") if _loaded(pairs[name][1]) in (None, 1.0)]
        closed = {name: _closed(name, pairs) or 0.0 for name in others}
        lower = all(pairs["kvlab-memory"][1]["p99_ttft_ms"] < pairs[name][1]["p99_ttft_ms"] for name in others)
        said = ", ".join(f"{name} {percent(value)}" for name, value in closed.items())
        text = f"{title}, {dataset}: at least 90% of the gap closed, more than by caches that load all hits, p99 below theirs"
        return Goal(text, f"{percent(ours or 0)}; {said}", (ours or 0) >= max(0.9, *closed.values()) and lower)
    tier = "disk" if "kvlab-disk" in pairs else "redis"
    mine, theirs = (pairs[f"{name}-{tier}"][1]["mean_ttft_ms"] for name in ("kvlab", "lmcache"))
    text = f"{title}, {dataset}: second run below LMCache's on the same tier"
    return Goal(text, f"{num(mine, 0)} and {num(theirs, 0)} ms", mine < theirs)


PAGES = (serving,)
