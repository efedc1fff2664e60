"""Runs of servers that take turns, and one row for each run."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlab.machine.processes import usage
from kvlab.machine.provenance import filesystem
from kvlab.serving import client, counters, latency
from kvlab.serving.backends import Backend
from kvlab.serving.plan import Plan, Traffic
from kvlab.serving.provenance import serving_provenance
from kvlab.serving.running import start, warm_up
from kvlab.serving.server import Server
from kvlab.stores import open_store

Row = dict[str, Any]


def measure(plan: Plan, group: Sequence[tuple[int, Any]]) -> list[Row]:
    """All runs of some backends, given with their numbers, whose servers run at the same time: they take turns."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        running = [start(stack, plan, name, number) for number, name in group]
        for one in running:
            one.wait()
            plan.bar.step(f"{one.backend.name} healthy after {one.start_s:.0f} s")
        for one in running:
            warm_up(one.server, plan.warmups)
        for traffic in plan.traffic:
            first_texts: dict[int, list[str]] = {}
            for turn in range(1, plan.runs + 1):
                for at, one in enumerate(running):
                    if plan.restart and turn > 1:
                        plan.bar.doing(f"{one.backend.name}: starting the server again")
                        one.restart()
                        warm_up(one.server, plan.warmups)
                    plan.bar.doing(f"{one.backend.name}: {traffic.workload.name}, run {turn} of {plan.runs}")
                    row, texts = _one_run(plan, traffic, one.server, one.backend, turn)
                    row["same_texts"] = _share_equal(first_texts.setdefault(at, texts), texts)
                    row |= {"server_start_s": round(one.start_s, 1), "cache_bytes": plan.cache_bytes}
                    row |= {"together": len(group), "restarted": plan.restart and turn > 1} | serving_provenance()
                    if plan.out is not None:
                        with open(plan.out, "a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
                    rows.append(row)
                    share = row["hit_tokens"] / max(row["total_input_tokens"], 1)
                    plan.bar.step(f"{one.backend.name}: mean TTFT {row['mean_ttft_ms']:.1f} ms, {share:.0%} hit")
    return rows


def _one_run(plan: Plan, traffic: Traffic, server: Server, chosen: Backend, turn: int) -> tuple[Row, list[str]]:
    work = traffic.workload
    args = client.arguments(
        server,
        work.args,
        num_prompts=work.num_prompts,
        request_rate=traffic.request_rate,
        seed=traffic.seed,
        ignore_eos=plan.ignore_eos,
    )
    result = plan.folder / f"result-{chosen.name.replace(' ', '-')}-{time.time_ns()}.json"
    at = server.log.stat().st_size
    before = counters.read_counters(server.get("/metrics"))
    cpu_s, _ = usage(server.session)
    details = plan.client.run(server, args, result)
    time.sleep(0.5)  # counters and log lines of the last step
    after = counters.read_counters(server.get("/metrics"))
    cpu_after_s, rss_bytes = usage(server.session)
    with server.log.open("rb") as log:
        log.seek(at)
        loads = counters.read_loads(log.read().decode(errors="replace"))
    counted = counters.difference(before, after)
    hits = counters.hits_by_prompt(loads, details["input_lens"], client.REQUEST_PREFIX)
    first = min(details["start_times"])
    kept = ["duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"]
    kept += ["output_throughput", "total_token_throughput", "max_concurrent_requests"]
    row = {
        "backend": chosen.name,
        "run": turn,
        "dataset": work.name,
        "model": Path(plan.model).name,
        "num_prompts": work.num_prompts,
        "request_rate": traffic.request_rate if work.name != "trace" else "trace",
        "seed": traffic.seed,
        **{key: details[key] for key in kept if key in details},
        **{key: round(value, 6) for key, value in latency.summary(details).items()},
        "hit_tokens": counted.get("external_prefix_cache_hits", 0) + counted.get("prefix_cache_hits", 0),
        "hit_prompts": sum(hit > 0 for hit in hits),
        "loaded_tokens": sum(load.hit_tokens for load in loads) if chosen.tells_of_loads else None,
        "reusable_share": round(work.reusable_share, 4),
        "duplicate_prompts": work.num_duplicates,
        "counters": counted,
        "tiers": counters.by_tier(loads),
        "stored_bytes": _stored_bytes(chosen),
        "filesystem": filesystem(chosen.folder) if chosen.folder else None,
        "server_cpu_s": round(cpu_after_s - cpu_s, 2),
        "server_rss_bytes": rss_bytes,
        "warmups": plan.warmups,
        "server_args": [_shown(arg, plan) for arg in server.command[3:]],
        "server_env": {key: _shown(value, plan) for key, value in {**chosen.env, **plan.env}.items()},
        "client_args": [_shown(arg, plan) for arg in args],
        "errors": Counter(client.last_line(error) for error in details["errors"] if error),
        "ttfts_ms": latency.ttfts_ms(details),
        "starts_s": [round(t - first, 4) for t in details["start_times"]],
        "input_lens": details["input_lens"],
        "output_lens": details["output_lens"],
        "prompt_hits": hits if any(hits) else [],
        "itl_over_time": latency.itl_over_time(details),
    }
    return row, details["generated_texts"]


def _share_equal(texts: Sequence[str], others: Sequence[str]) -> float:
    """The share of answers that are those of another run. Less than 1 even without a cache where batches differ in
    size, as then kernels round differently; a cache that falls far below ``none`` serves wrong KV."""
    return round(sum(a == b for a, b in zip(texts, others, strict=True)) / max(len(texts), 1), 4)


def _stored_bytes(chosen: Backend) -> int | None:
    """Bytes that lie in the backend's secondary tiers now; None where it has none that can be asked."""
    total = None
    if chosen.folder is not None and chosen.folder.exists():
        total = sum(path.stat().st_size for path in chosen.folder.rglob("*") if path.is_file())
    if chosen.redis is not None:
        with open_store(chosen.redis) as store:
            total = (total or 0) + store.used_bytes
    return total


def _shown(text: str, plan: Plan) -> str:
    """Without the folders of this machine."""
    return text.replace(str(plan.folder), "FOLDER").replace(plan.model, Path(plan.model).name)
