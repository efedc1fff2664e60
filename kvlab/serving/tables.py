"""Rows of serving runs as tables: first and second run with their reduction, and one run as vLLM prints it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from kvlab.errors import ConfigError
from kvlab.serving.backends import DEPRECATED
from kvlab.serving.latency import reduction

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One backend's first run against its last. Shares are of 1; `low` and `high` bound a 95% interval."""

    backend: str
    first: Row
    last: Row
    reduction: float
    low: float
    high: float
    gap_closed: float | None
    first_over_none: tuple[float, float | None] | None

    @property
    def verdict(self) -> str:
        """What may be said: an interval that holds 0 is no difference, and a hit that was never loaded no hit."""
        if not_loaded(self.last) > 0:
            return "hits not loaded"
        if self.low > 0:
            return "faster"
        return "slower" if self.high < 0 else "not faster"


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read rows from {str(path)!r}: {getattr(error, 'strerror', '') or error}") from error


def not_loaded(row: Row) -> float:
    """The share (of 1) of a run's hit tokens that the connector promised the engine and did not load: unless it told
    the engine so, they were answered from whatever lay in the pages. 0 where the server's log tells of no loads."""
    loaded, hit = row.get("loaded_tokens"), row["hit_tokens"]
    share = 0.0 if loaded is None or not hit else max(1 - loaded / hit, 0.0)
    return share if share > 0.001 else 0.0


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """First run against last of each backend of one comparison, in the order of the rows.

    `gap_closed` says how much of the distance between ``none`` and ``vllm-prefix`` (mean TTFT of their last runs) the
    backend's last run closes; None where those two were not both measured. `first_over_none` is what the first run
    costs: mean TTFT and mean TPOT over those of the first run of ``none``, less 1; no TPOT for answers of one token.
    """
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["backend"], []).append(row)
    lasts = {name: max(found, key=lambda row: row["run"]) for name, found in runs.items()}
    bounds = [lasts[name]["mean_ttft_ms"] for name in ("none", "vllm-prefix") if name in lasts]
    plain = min(runs.get("none", ()), key=lambda row: row["run"], default=None)
    compared = []
    for name, found in runs.items():
        first, last = min(found, key=lambda row: row["run"]), lasts[name]
        if first is last:
            continue
        share, low, high = reduction(first["ttfts_ms"], last["ttfts_ms"])
        gap = (
            (bounds[0] - last["mean_ttft_ms"]) / (bounds[0] - bounds[1])
            if len(bounds) == 2 and bounds[0] > bounds[1]
            else None
        )
        compared.append(Comparison(name, first, last, share, low, high, gap, _over(first, plain)))
    return compared


def report(rows: Iterable[Row]) -> str:
    """The first/second/reduction table as Markdown; one table for each dataset, model, request rate and seed in `rows`,
    and one of `first_runs` where there are no others."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_sent(row), []).append(row)
    parts = []
    for (dataset, model, num_prompts, rate, _), group in groups.items():
        pace = "a trace's own times" if rate == "trace" else f"{rate:g} requests/s"
        title = f"{model}, {dataset}, {num_prompts} prompts, {pace}; {group[0].get('gpu') or group[0].get('cpu', '')}"
        if compared := compare(group):
            parts.append(f"{title}\n\n" + _table(compared))
        if failed := _failed(group):
            parts.append(failed)
    alone = [row for group in groups.values() if all(row["run"] == 1 for row in group) for row in group]
    if table := first_runs(alone):
        parts.append("First runs\n\n" + table)
    return "\n\n".join(parts)


def _failed(rows: Iterable[Row]) -> str:
    """One line for each run in which requests failed, with their reasons; means are over the others."""
    return "\n".join(
        f"{shown(row['backend'])}, run {row['run']}: {sum(row['errors'].values())} of {row['num_prompts']} requests"
        f" failed: {'; '.join(row['errors'])}"
        for row in rows
        if row.get("errors")
    )


def first_runs(rows: Iterable[Row]) -> str:
    """What a cache costs where nothing can be hit, as a Markdown table: first runs over those of ``none`` on the same
    prompts, for each backend the median and the range over all datasets and seeds in `rows`. Empty without ``none``."""
    plain: dict[tuple[Any, ...], Row] = {}
    found: dict[str, list[tuple[float, float | None]]] = {}
    firsts = [row for row in rows if row["run"] == 1]
    for row in firsts:
        if row["backend"] == "none":
            plain[_sent(row)] = row
    for row in firsts:
        over = _over(row, plain.get(_sent(row)))
        if over is not None:
            found.setdefault(row["backend"], []).append(over)
    if not found:
        return ""
    lines = ["| backend | runs | TTFT over none | TPOT over none |", "|---|---|---|---|"]
    for name, overs in found.items():
        columns = [[over for over in each if over is not None] for each in zip(*overs, strict=True)]
        cells = [f"{median(c):+.1%} ({min(c):+.1%} to {max(c):+.1%})" if c else "" for c in columns]
        lines.append(f"| {shown(name)} | {len(overs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sent(row: Row) -> tuple[Any, ...]:
    """What was sent: rows that agree in it may be compared."""
    return row["dataset"], row["model"], row["num_prompts"], row["request_rate"], row.get("seed", 0)


def _over(row: Row, plain: Row | None) -> tuple[float, float | None] | None:
    """TTFT and TPOT over those of `plain`; no TPOT where all answers are of one token."""
    if plain is None or row is plain:
        return None
    tpot = row["mean_tpot_ms"] / plain["mean_tpot_ms"] - 1 if plain["mean_tpot_ms"] else None
    return row["mean_ttft_ms"] / plain["mean_ttft_ms"] - 1, tpot


def _table(compared: Sequence[Comparison]) -> str:
    head = ["backend", "TTFT 1st ms", "TTFT 2nd ms", "reduction", "95% interval", "verdict", "p99 1st", "p99 2nd"]
    head += ["TPOT 1st", "TPOT 2nd", "hit tokens", "gap closed", "1st over none: TTFT, TPOT"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in compared:
        first, last = one.first, one.last
        hit = last["hit_tokens"] / max(last["total_input_tokens"], 1)
        cells = [shown(one.backend), f"{first['mean_ttft_ms']:.2f}", f"{last['mean_ttft_ms']:.2f}"]
        cells += [f"{one.reduction:+.1%}", f"{one.low:+.1%} to {one.high:+.1%}", one.verdict]
        cells += [f"{row[f'p99_{metric}_ms']:.2f}" for metric in ("ttft",) for row in (first, last)]
        cells += [f"{row['mean_tpot_ms']:.2f}" for row in (first, last)]
        missing = not_loaded(last)
        cells += [
            f"{hit:.1%}" + (f", {missing:.1%} of them not loaded" if missing else ""),
            "" if one.gap_closed is None else f"{one.gap_closed:.0%}",
        ]
        cells.append(", ".join(f"{over:+.1%}" for over in one.first_over_none or () if over is not None))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(backend: str) -> str:
    """A backend's name, with what its makers say of it."""
    return f"{backend} (deprecated)" if backend in DEPRECATED else backend


def serving_block(row: Row) -> str:
    """One run as ``vllm bench serve`` prints it, and what the cache did below."""
    title = f" {shown(row['backend'])}, {row['dataset']}, run {row['run']}: Serving Benchmark Result "
    parts = [f"{title:=^60}"]
    counts = {
        "Successful requests": "completed",
        "Failed requests": "failed",
        "Benchmark duration (s)": "duration",
        "Total input tokens": "total_input_tokens",
        "Total generated tokens": "total_output_tokens",
        "Request throughput (req/s)": "request_throughput",
        "Output token throughput (tok/s)": "output_throughput",
        "Total token throughput (tok/s)": "total_token_throughput",
    }
    parts += [_line(label, row.get(key)) for label, key in counts.items()]
    names = {
        "ttft": "Time to First Token",
        "tpot": "Time per Output Token",
        "itl": "Inter-token Latency",
        "e2el": "End-to-end Latency",
    }
    for name, title in names.items():
        parts.append(f"{title:-^60}")
        for statistic in ("mean", "median", "p99"):
            parts.append(_line(f"{statistic.capitalize()} {name.upper()} (ms)", row[f"{statistic}_{name}_ms"]))
    parts.append(f"{'KV cache':-^60}")
    parts += [_line("Hit tokens", row["hit_tokens"]), _line("Prompts with a hit", row["hit_prompts"])]
    if not_loaded(row):
        parts.append(_line("Hit tokens never loaded (%)", 100 * not_loaded(row)))
    for tier, told in row["tiers"].items():
        parts.append(_line(f"From {tier} (MB)", told["bytes"] / 1e6))
        parts.append(_line(f"From {tier} (GB/s)", told["gb_per_s"]))
    if row["stored_bytes"] is not None:
        parts.append(_line("Stored in secondary tiers (MB)", row["stored_bytes"] / 1e6))
    parts += [_line("Server CPU (s)", row["server_cpu_s"]), _line("Server memory (MB)", row["server_rss_bytes"] / 1e6)]
    return "\n".join([*parts, "=" * 60])


def _line(label: str, value: Any) -> str:
    shown = "n/a" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label + ':':<40} {shown:<10}".rstrip()
