"""Pages of the vLLM connector: TTFT of hits, cost of first runs, copies, hooks."""

from measured.pages import Goal, Page, Row, Table, interval, num, pivot, read

KV_BYTES = 57_344  # of a token of Qwen2.5-7B
BASE = "03a2e51"  # before several groups, hints, changing weights and tier workers
ORDER = ("none", "vllm-offload", "lmcache", "kvlab", "vllm-prefix")


def ttft() -> Page:
    rows = read("gpu_ttft.csv")
    at = {(row["backend"], int(row["tokens"])): row for row in rows}
    lengths = sorted({tokens for _, tokens in at})
    longest = lengths[-1]

    def median(backend: str, tokens: int) -> float:
        return float(at[backend, tokens]["ttft_ms_median"])

    def cell(backend: str, tokens: int) -> str:
        row = at[backend, tokens]
        return f"{num(row['ttft_ms_median'], 1)} ({num(row['ttft_ms_min'], 1)})"

    link = max(float(row["memcpy_gb_per_s"]) for row in read("gpu_transfer.csv") if row["what"] == "load")
    floor = {n: median("vllm-prefix", n) + n * KV_BYTES / link / 1e6 for n in lengths}
    over_floor = {n: median("kvlab", n) / floor[n] for n in lengths}
    below = [n for n in lengths if median("kvlab", n) < min(median("lmcache", n), median("vllm-offload", n))]
    of_lmcache = median("kvlab", longest) / median("lmcache", longest)
    return Page(
        "ttft",
        "What does a hit cost in TTFT?",
        f"{longest:,} tokens: {median('kvlab', longest):.0f} ms from kvlab's memory tier, {median('none', longest):.0f} ms computed.",
        [
            Table(
                "TTFT in ms, one request at a time: median (least)",
                ["tokens", *ORDER],
                [[f"{n:,}", *(cell(backend, n) for backend in ORDER)] for n in lengths],
                rows,
                "Qwen2.5-7B's shapes with random weights; five engines side by side, asked in turns; CUDA graphs for all but the attention, so that LMCache loads.",
            ),
            Table(
                "kvlab against the others",
                ["tokens", "/ LMCache", "/ OffloadingConnector", "/ (prefix hit + bytes)"],
                [
                    [
                        f"{n:,}",
                        num(median("kvlab", n) / median("lmcache", n)),
                        num(median("kvlab", n) / median("vllm-offload", n)),
                        num(over_floor[n]),
                    ]
                    for n in lengths
                ],
                rows,
                f"The last column's floor is the median of vLLM's own prefix cache plus the KV's bytes at {link:.1f} GB/s, a pinned memcpy's rate.",
            ),
        ],
        [
            Goal("below both other caches in host memory at every length", f"at {len(below)} of {len(lengths)}", len(below) == len(lengths)),
            Goal(
                "at most 1.15 of a prefix hit plus the bytes",
                ", ".join(f"{num(ratio)} ({n:,})" for n, ratio in over_floor.items()),
                max(over_floor.values()) <= 1.15,
            ),
            Goal(f"0.65 of LMCache's time at {longest:,} tokens", num(of_lmcache), of_lmcache <= 0.65),
        ],
        "Backends that run one after the other, each alone on the card, differ by as much as these differ: look at the least before the medians. "
        "At the shortest length the order of turns costs every cache some milliseconds in the median.",
        ["gpu_ttft.csv", "gpu_transfer.csv"],
    )  # fmt: skip


def ttft_tiers() -> Page:
    rows = read("gpu_ttft_tiers.csv")
    lengths = sorted({int(row["tokens"]) for row in rows})
    kinds = ("medium", "backend", "readers", "graphs")
    runs = list(dict.fromkeys(tuple(row[kind] for kind in kinds) for row in rows))

    def cell(run: tuple[str, ...], tokens: int) -> str:
        found = [r for r in rows if (*(r[kind] for kind in kinds), int(r["tokens"])) == (*run, tokens)]
        return "; ".join(f"{num(r['ttft_ms_median'], 1)} ({num(r['ttft_ms_min'], 1)})" for r in found)

    def medians(backend: str, tokens: int = lengths[-1]) -> list[float]:
        """Of each run but those on the disk, latest last."""
        found = [r for r in rows if r["backend"] == backend and int(r["tokens"]) == tokens and r["medium"] != "disk"]
        return [float(r["ttft_ms_median"]) for r in found]

    ours = medians("kvlab-disk")
    serve = [medians("kvlab-serve", n)[-1] / medians("kvlab", n)[-1] for n in lengths]
    redis = [medians("kvlab-redis", n)[-1] / medians("lmcache-redis", n)[-1] for n in lengths]
    folder = [medians("kvlab-disk", n)[-1] / medians("lmcache-disk", n)[-1] for n in lengths]

    def told(ratios: list[float]) -> str:
        return ", ".join(f"{num(ratio)} ({n:,})" for ratio, n in zip(ratios, lengths, strict=True))

    return Page(
        "ttft_tiers",
        "What does a hit cost that lies in a secondary tier alone?",
        f"{lengths[-1]:,} tokens from a folder in memory: {ours[-1]:.0f} ms; from Redis {medians('kvlab-redis')[-1]:.0f} ms, where LMCache takes {medians('lmcache-redis')[-1]:.0f}.",
        [
            Table(
                "TTFT in ms, one request at a time: median (least); a second value is another run",
                ["the hit lies in", "backend", "readers", "CUDA graphs", *(f"{n:,} tokens" for n in lengths)],
                [[*run, *(cell(run, n) for n in lengths)] for run in runs],
                rows,
                "Qwen2.5-7B's shapes with random weights; the engines of a run side by side, asked in turns. *readers*: threads of the tier worker. LMCache reads its folder through the page cache, which still holds what was just written: on the disk its rows show memory, kvlab's the disk (it bypasses that cache; `direct=false` does not).",
            )
        ],
        [
            Goal("a folder in memory, the longest prompt: at most 115 ms", ", ".join(f"{each:.0f} ms" for each in ours), max(ours) <= 115),
            Goal("a folder in memory: below LMCache at every length, in the latest run", told(folder), max(folder) < 1),
            Goal("the memory of `kvlab serve`: within 5% of the engine's own, in the latest run", told(serve), max(serve) <= 1.05),
            Goal("Redis: below LMCache at every length, in the latest run", told(redis), max(redis) < 1),
        ],
        "Since commit c29345b5 an engine copies from the memory of `kvlab serve` where it lies, before that by way of its own. What is left was profiled with eager steps "
        "(`gpu_ttft_profile.py`, 15,000 tokens): copies to the GPU take 15.8 ms in both. From the engine's own memory they begin in the step that computes the last token, 7 ms behind the request, "
        "and hide behind its launches. From the server's they begin at 15 ms, as 58 objects are asked for first, and that step begins at 35 ms, when all have come.",
        files=["gpu_ttft_tiers.csv"],
    )  # fmt: skip


def ttft_ranks() -> Page:
    rows = read("gpu_ttft_ranks.csv")
    lengths = sorted({int(row["tokens"]) for row in rows})
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    at = {(row["backend"], int(row["tokens"])): row for row in rows}

    def median(backend: str, tokens: int) -> float:
        return float(at[backend, tokens]["ttft_ms_median"])

    def cell(backend: str, tokens: int) -> str:
        return f"{num(at[backend, tokens]['ttft_ms_median'], 1)} ({num(at[backend, tokens]['ttft_ms_min'], 1)})"

    longest = lengths[-1]
    return Page(
        "ttft_ranks",
        "What does a hit cost with two tensor-parallel ranks?",
        f"{longest:,} tokens on two GPUs: {median('kvlab', longest):.0f} ms from host memory, {median('kvlab-disk', longest):.0f} ms from a folder in memory, {median('none', longest):.0f} ms computed.",
        [
            Table(
                "TTFT in ms, one request at a time: median (least)",
                ["tokens", *backends],
                [[f"{n:,}", *(cell(backend, n) for backend in backends)] for n in lengths],
                rows,
                "Qwen2.5-7B's shapes with random weights, eager; four engines of two ranks side by side on two GPUs, asked in turns. kvlab loads between steps, in both ranks at once. The fourth engine was LMCache's; it has no row, as it found nothing: its ranks name tokens by Python's hash, whose seed the run did not set (the benchmark does now).",
            )
        ],
        files=["gpu_ttft_ranks.csv"],
    )  # fmt: skip


def first_runs() -> Page:
    rows = read("gpu_steps.csv")
    turns = {"first": "new prompts", "second": "the same again", "lower": "the same, memory emptied"}

    def graphs(row: Row) -> str:
        return "pieces" if "PIECEWISE" in row["command"] else "full"

    shown = [row for row in rows if row["turn"] in turns]
    memory, secondary = ([row for row in shown if bool(row["lower"]) is lower] for lower in (False, True))
    plain = [row for row in memory if row["turn"] == "first" and row["serde"] == "naive"]
    coded = next(row for row in memory if row["turn"] == "first" and row["serde"] != "naive")
    best = max(plain, key=lambda row: int(row["rounds"]))
    full = [row for row in secondary if row["turn"] == "first" and graphs(row) == "full"]
    worst = max(full, key=lambda row: float(row["ttft_ms_over_off"]))
    of_tier = {row["lower"]: row for row in full}

    def cells(row: Row) -> list[str]:
        where = {"file": "disk", "redis": "Redis", "": "memory alone"}[row["lower"]]
        where += "" if row["serde"] == "naive" else f", as {row['serde']}"
        cpu = interval(row, "step_cpu_ms", 2) if row["step_cpu_ms_over_off"] else ""
        return [
            where, graphs(row), row["cores"], row["rounds"], turns[row["turn"]],
            num(row["ttft_ms"], 1), interval(row, "ttft_ms", 2), interval(row, "gap_ms"), num(row["gap_p50_ms_over_off"], 3), cpu,
        ]  # fmt: skip

    head = [
        "saves to",
        "graphs",
        "cores",
        "rounds",
        "prompts",
        "TTFT ms",
        "TTFT ratio",
        "mean gap",
        "median gap",
        "engine thread's CPU",
    ]
    return Page(
        "first_runs",
        "What does saving cost a first run?",
        f"Host memory alone: {interval(best, 'ttft_ms')} of the TTFT without the connector's hooks. With a secondary tier up to {num(worst['ttft_ms_over_off'])}.",
        [
            Table("Host memory alone", head, [cells(row) for row in memory], memory),
            Table("Host memory, then a secondary tier", head, [cells(row) for row in secondary], secondary),
        ],
        [
            Goal(
                "host memory alone: at most 1% of TTFT and of the gap between tokens",
                f"TTFT {interval(best, 'ttft_ms')}, mean gap {interval(best, 'gap_ms')}",
                float(best["ttft_ms_over_off"]) <= 1.01 and float(best["gap_ms_over_off"]) <= 1.01,
            ),
            *(
                Goal(
                    f"{name} below it: at most 1% of TTFT and of the gap, 5% of its p99",
                    f"TTFT {interval(row, 'ttft_ms')}, mean gap {interval(row, 'gap_ms')}, p99 {interval(row, 'gap_p99_ms')}",
                    max(float(row["ttft_ms_over_off"]), float(row["gap_ms_over_off"])) <= 1.01
                    and float(row["gap_p99_ms_over_off"]) <= 1.05,
                )
                for name, row in (("a disk", of_tier["file"]), ("Redis", of_tier["redis"]))
            ),
            Goal(
                f"host memory as {coded['serde']}: at most 1% of TTFT and of the gap between tokens",
                f"TTFT {interval(coded, 'ttft_ms')}, mean gap {interval(coded, 'gap_ms')}",
                float(coded["ttft_ms_over_off"]) <= 1.01 and float(coded["gap_ms_over_off"]) <= 1.01,
            ),
        ],
        "Ratios are to rounds of the same engine with the hooks out, 95% intervals in brackets; a request every eighth step. The last kind of prompt was stored before, but only the secondary tier still has it, and most of these "
        "loads are not worth making. On the machines with 32 cores other engines ran on the other card.",
        ["gpu_steps.csv"],
    )


def gpu_transfer() -> Page:
    rows = [{**row, "method": row["method"].replace("kvlab ring", "kvlab")} for row in read("gpu_transfer.csv")]
    alone = [row for row in rows if "peers" not in row["command"] and row["method"] == "kvlab"]
    beside = [row for row in rows if "peers" in row["command"]]
    default = {
        (row["what"], float(row["mib"])): float(row["ratio"]) for row in alone if row["command"].endswith("128MiB")
    }
    whats = ("load", "save", "both")
    limits = [
        (14, 0.9, ("load", "save")),
        (64, 0.95, ("load", "save")),
        (128, 0.97, ("load", "save")),
        (64, 0.95, ("both",)),
    ]
    goals = []
    for least, limit, which in limits:
        near = {14: (13, 15), 64: (63, 1e9), 128: (127, 1e9)}[least]
        found = [
            round(ratio, 2) for (what, mib), ratio in default.items() if what in which and near[0] <= mib <= near[1]
        ]
        text = f"{' and '.join(which) if which != ('both',) else 'both directions at once'}: {limit} {'at' if least == 14 else 'from'} {least} MiB{' on' if least != 14 else ''}"
        goals.append(Goal(text, f"{min(found):.2f} at least", min(found) >= limit))
    tables = []
    for what in whats:
        of = [row for row in beside if row["what"] == what]
        if of:
            head, cells = pivot(of, "mib", "method", lambda row: num(row["ratio"]))
            tables.append(Table(f"Beside other libraries: {what}", ["MiB", *head[1:]], cells, of))
    sized = [{**row, "column": f"{row['what']}, {row['command'].rpartition(' ')[2]}"} for row in alone]
    head, cells = pivot(sized, "mib", "column", lambda row: num(row["ratio"]))
    tables.insert(
        0,
        Table(
            "kvlab alone, by size of its GPU buffers",
            ["MiB", *head[1:]],
            cells,
            alone,
            "Shares of a single pinned memcpy's rate, timed in the same run.",
        ),
    )
    profile = [row for row in read("gpu_transfer_profile.csv") if int(row["staging_mib"]) < 128]
    columns = ("what", "mib", "pieces", "queue", "whole", "memcpy", "head", "copies", "gaps", "tail")
    tables.append(
        Table(
            "Where the microseconds go",
            columns,
            [[row[name] for name in columns] for row in profile],
            profile,
            "*queue*: until the call returned; *whole*: until the GPU had ended; *memcpy*: one copy of the same bytes. The others are torch's profiler, which slows calls down: *head* passes before the first byte moves, *gaps* between copies, *tail* is the last scatter.",
        )
    )
    large = min(ratio for (what, mib), ratio in default.items() if what == "load" and mib > 127)
    small = default["load", 14.0]
    return Page(
        "gpu_transfer",
        "How close do transfers come to a memcpy?",
        f"Loads: {small:.2f} of a pinned memcpy at 14 MiB, {large:.2f} and more from 128 MiB on.",
        tables,
        goals,
        "Pages of 32 KiB in one call of the driver (*batch*, and vLLM's own) are bound by the number of copies. LMCache's kernel reads and writes host memory itself.",
        ["gpu_transfer.csv", "gpu_transfer_profile.csv"],
    )


def hooks() -> Page:
    rows = read("hook_times.csv")
    last = {}
    for row in rows:
        last[row["hook"], row["gpu"] or "CPU", row["lower"], row["commit"] == BASE] = row
    shown = [
        {**row, "column": f"{gpu}{', secondary tier' if lower else ''}{f', commit {BASE}' if is_base else ''}"}
        for (_, gpu, lower, is_base), row in last.items()
    ]
    head, cells = pivot(
        shown,
        "hook",
        "column",
        lambda row: f"{num(row['us_per_step'], 1)} ({num(row['lowest'], 1)} to {num(row['highest'], 1)})",
    )
    total = [row for row in shown if row["hook"].startswith("all but")]
    base = [row for row in rows if row["hook"].startswith("all but") and row["commit"] == BASE]
    same = [row for row in rows if row["hook"].startswith("all but") and _place(row) == _place(base[-1])]
    before, after = ([float(r["us_per_step"]) for r in same if (r["commit"] == BASE) is old] for old in (True, False))
    return Page(
        "hooks",
        "What do the connector's hooks take of a step?",
        "; ".join(f"{row['column']}: {float(row['us_per_step']):.0f} us" for row in total) + ", without the copies.",
        [Table("Microseconds of a step, median (lowest to highest)", head, cells, list(last.values()))],
        [
            Goal(
                f"not above commit {BASE} on the same machine",
                f"{min(after):.0f} to {max(after):.0f} us, before {min(before):.0f} to {max(before):.0f}",
                min(after) <= max(before),
            )
        ],
        files=["hook_times.csv"],
    )


def _place(row: Row) -> tuple[str, str]:
    return row["gpu"], row["date"]


PAGES = (ttft, ttft_tiers, ttft_ranks, first_runs, gpu_transfer, hooks)
