"""Serving runs: start a server with a backend, run vLLM's benchmark client several times, collect rows, stop it all."""

import contextlib
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.datasets.demo_model import demo_model
from kvlab.errors import ConfigError
from kvlab.machine.processes import usage
from kvlab.machine.provenance import filesystem, gpu_name
from kvlab.machine.redis_server import RedisServer
from kvlab.progress import Progress
from kvlab.serving import client, counters, latency, preflight
from kvlab.serving.backends import NAMES, NEEDS_REDIS, Backend, from_tiers, named_backend
from kvlab.serving.leaving import Leaving
from kvlab.serving.provenance import serving_provenance
from kvlab.serving.server import Server
from kvlab.serving.workloads import KINDS, Workload, check_kind, make_workload
from kvlab.stores import open_store
from kvlab.units import parse_bytes

Row = dict[str, Any]
logger = logging.getLogger("kvlab")
WARMUP_TOKENS = 300  # more than one chunk of 256, so that both a chunk and a tail are stored and loaded


@dataclass(frozen=True)
class Traffic:
    """One dataset as it is sent; its rate is in requests per second, its seed also that of the arrivals."""

    workload: Workload
    request_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every backend of one comparison shares."""

    model: str
    traffic: tuple[Traffic, ...]
    runs: int
    server_flags: tuple[str, ...]
    backend_flags: Mapping[str, Sequence[str]]
    env: Mapping[str, str]
    port: int | None
    ignore_eos: bool
    warmups: int
    start_timeout_s: float
    folder: Path
    bar: Progress
    client: client.Client
    cache_bytes: int
    redis_url: str | None
    settings: Mapping[str, Any] | None
    out: str | Path | None


def run(
    backends: str | Sequence[str | Sequence[str]],
    *,
    model: str | None = None,
    dataset: str | Sequence[str] = "sharegpt",
    dataset_path: str | None = None,
    num_prompts: int | Sequence[int] | None = None,
    request_rate: float | Sequence[float] | None = None,
    runs: int = 2,
    together: bool = False,
    seed: int | Sequence[int] = 0,
    output_len: int | None = None,
    max_prompt_tokens: int = 8192,
    cache_size: str | int | None = None,
    redis_url: str | None = None,
    settings: Mapping[str, Any] | None = None,
    server_flags: Sequence[str] = (),
    backend_flags: Mapping[str, Sequence[str]] | None = None,
    env: Mapping[str, str] | None = None,
    port: int | None = None,
    ignore_eos: bool = False,
    warmups: int = 2,
    start_timeout_s: float = 600.0,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure each of `backends` on the same prompts at the same times; one row per run.

    Parameters
    ----------
    backends
        one or a list, measured in this order, each with a server of its own: names of
        `kvlab.serving.backends.NAMES`, or store URLs for kvlab over that tier. A list of URLs inside the list, fastest
        first, is one backend over these tiers: ``["none", ["memory://?size=1GiB", "file:///kv?size=8GiB"]]``.
    model
        folder or hub id; None is the small demo model.
    dataset
        ``sharegpt``, ``rounds``, ``documents`` or ``trace``; `dataset_path` is the user's own file. Several are
        sent one after the other to the same server; then `num_prompts`, `request_rate` and `seed` may be one for each.
        ``sharegpt`` with several seeds and one run each gives several first runs: no prompt of one is in another.
    num_prompts, request_rate
        of each run, and requests per second, Poisson arrivals (a trace brings its own times); default 1024 and 16 where
        there is an NVIDIA GPU, else 32 and 1.
    runs
        how often the same prompts are sent to the same server. The first fills the cache, later ones use it.
    together
        start all servers first and let their runs take turns, so that a machine that grows slower or faster
        does so for all alike. All must fit beside each other: give ``--kv-cache-memory-bytes``, as vLLM measures what
        is free wrongly while others start; and the disk and Redis of one are not at rest while another starts.
    cache_size
        bytes of each backend's tier; default 20GiB where there is an NVIDIA GPU, else 2GiB.
    settings
        of kvlab's connector, see `ConnectorConfig`. `server_flags` and `env` go to every server alike,
        `backend_flags` by name to one: a larger pool for ``vllm-prefix``, whose cache lies in it.
    warmups
        random prompts of 300 tokens, each sent twice before the first run; they share nothing with the dataset.
    folder
        where disk tiers, logs and detailed results go, and stay. None: a temporary folder, removed at the end.
    out
        a file of JSON lines; rows are appended as they come.
    tell
        called with one line that says what is about to run, once all is checked.

    A bar shows what runs, what is left and the latest run's result; ``TQDM_DISABLE=1`` turns it off.

    Raises ConfigError or StoreError in one line. No process that it started survives it, after an interrupt either.
    """
    names = [backends] if isinstance(backends, str) else list(backends)
    if not names:
        raise ConfigError(f"give a backend: a store URL, or one of {', '.join(NAMES)}")
    datasets = [dataset] if isinstance(dataset, str) else list(dataset)
    if not datasets:
        raise ConfigError(f"give a dataset: one of {', '.join(KINDS)}")
    for kind in datasets:
        check_kind(kind)
    usual = preflight.usual_traffic()
    counts = _for_each(usual[0] if num_prompts is None else num_prompts, datasets, "num_prompts")
    rates = _for_each(usual[1] if request_rate is None else request_rate, datasets, "request_rate")
    seeds = _for_each(seed, datasets, "seed")
    if runs < 1 or min(rates) <= 0:
        raise ConfigError(f"runs and request_rate must be positive, got {runs} and {min(rates)}")
    if together and port is not None:
        raise ConfigError("servers that run together cannot share a port; give none for free ones")
    if unknown := set(backend_flags or ()) - {name for name in names if isinstance(name, str)}:
        raise ConfigError(f"backend_flags names {', '.join(sorted(unknown))}, which is not among the backends")
    size = parse_bytes(cache_size if cache_size is not None else ("20GiB" if gpu_name() else "2GiB"))
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        if folder is None:
            place = Path(tempfile.mkdtemp(prefix="kvlab-bench-"))
            stack.push(Leaving(place))
        else:
            place = Path(folder).resolve()
            place.mkdir(parents=True, exist_ok=True)
        # Refuses a wrong name or URL before anything is downloaded or started.
        chosen = [_backend(name, size, place / "tier", redis_url or "redis://127.0.0.1:1", settings) for name in names]
        preflight.check(names, cache_bytes=size, redis_url=redis_url, together=together, out=out)
        pool = preflight.pool_flags(server_flags, backend_flags or {}, len(names) if together else 1)
        model = demo_model(model)
        if tell is not None:
            tell(preflight.plan_line([one.name for one in chosen], runs, datasets, counts, rates))
        measuring = stack.enter_context(client.Client(place / "client.log"))
        steps = len(datasets) + len(names) * (1 + len(datasets) * runs)
        bar = stack.enter_context(Progress(steps, "serving", unit="step"))
        traffic: list[Traffic] = []
        sent: set[str] = set()
        for kind, count, rate, chance in zip(datasets, counts, rates, seeds, strict=True):
            bar.doing(f"making the {kind} workload")
            files = place / f"workload-{len(traffic)}"
            files.mkdir(exist_ok=True)
            workload = make_workload(
                kind,
                files,
                tokenizer=model,
                path=dataset_path,
                num_prompts=count,
                seed=chance,
                output_len=output_len,
                max_prompt_tokens=max_prompt_tokens,
                sent=sent,
            )
            if workload.num_prompts < count:
                logger.warning(
                    "%s has %d prompts that fit, not %d; none is sent twice", kind, workload.num_prompts, count
                )
            traffic.append(Traffic(workload, rate, chance))
            bar.step()
        plan = Plan(
            model=model,
            traffic=tuple(traffic),
            runs=runs,
            server_flags=(*server_flags, *pool),
            backend_flags=dict(backend_flags or {}),
            env=dict(env or {}),
            port=port,
            ignore_eos=ignore_eos,
            warmups=warmups,
            start_timeout_s=start_timeout_s,
            folder=place,
            bar=bar,
            client=measuring,
            cache_bytes=size,
            redis_url=redis_url,
            settings=settings,
            out=out,
        )
        numbered = list(enumerate(names))
        for group in [numbered] if together else [[one] for one in numbered]:
            rows += _measure(plan, group)
    return rows


def _for_each(value: Any, datasets: Sequence[str], name: str) -> list[Any]:
    """One value for each dataset, from one for all or a list of as many."""
    if not isinstance(value, Sequence):
        return [value] * len(datasets)
    if len(value) != len(datasets):
        raise ConfigError(
            f"{name} must be one number or one for each of {len(datasets)} datasets, got {len(value)} numbers"
        )
    return list(value)


def _backend(
    name: str | Sequence[str], size: int, folder: Path, redis_url: str | None, settings: Mapping[str, Any] | None
) -> Backend:
    if isinstance(name, str) and "://" not in name:
        return named_backend(name, cache_bytes=size, folder=folder, redis_url=redis_url, settings=settings)
    return from_tiers([name] if isinstance(name, str) else list(name), settings=settings)


@dataclass(frozen=True)
class _Running:
    """A backend and its server."""

    backend: Backend
    server: Server


def _measure(plan: Plan, group: Sequence[tuple[int, Any]]) -> list[Row]:
    """All runs of some backends, given with their numbers, whose servers run at the same time: they take turns."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        running = [_start(stack, plan, name, number) for number, name in group]
        start_s: list[float] = []
        for one in running:
            one.server.wait()
            start_s.append(time.monotonic() - began)
            plan.bar.step(f"{one.backend.name} healthy after {start_s[-1]:.0f} s")
        for one in running:
            _warm_up(one.server, plan.warmups)
        for traffic in plan.traffic:
            first_texts: dict[int, list[str]] = {}
            for turn in range(1, plan.runs + 1):
                for at, one in enumerate(running):
                    plan.bar.doing(f"{one.backend.name}: {traffic.workload.name}, run {turn} of {plan.runs}")
                    row, texts = _one_run(plan, traffic, one.server, one.backend, turn)
                    row["same_texts"] = _share_equal(first_texts.setdefault(at, texts), texts)
                    row |= {"server_start_s": round(start_s[at], 1), "cache_bytes": plan.cache_bytes}
                    row |= {"together": len(group)} | serving_provenance()
                    if plan.out is not None:
                        with open(plan.out, "a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")
                    rows.append(row)
                    share = row["hit_tokens"] / max(row["total_input_tokens"], 1)
                    plan.bar.step(f"{one.backend.name}: mean TTFT {row['mean_ttft_ms']:.1f} ms, {share:.0%} hit")
    return rows


def _start(stack: contextlib.ExitStack, plan: Plan, name: str | Sequence[str], number: int) -> _Running:
    """Start a backend's server, on an empty tier; `stack` ends it and what it needs."""
    redis_url = plan.redis_url
    if name in NEEDS_REDIS and redis_url is None:
        redis_url = stack.enter_context(
            RedisServer(f"maxmemory {plan.cache_bytes}", "maxmemory-policy allkeys-lru")
        ).url
    tier = plan.folder / f"tier-{number}"
    chosen = _backend(name, plan.cache_bytes, tier, redis_url, plan.settings)
    if chosen.folder == tier:
        tier.mkdir(parents=True, exist_ok=True)
        stack.callback(shutil.rmtree, tier, ignore_errors=True)
    server = Server(
        plan.model,
        (*plan.server_flags, *(plan.backend_flags.get(name, ()) if isinstance(name, str) else ()), *chosen.flags),
        port=plan.port,
        env={**chosen.env, **plan.env},
        log=plan.folder / f"server-{number}-{chosen.name.replace(' ', '-')}.log",
        timeout_s=plan.start_timeout_s,
    )
    plan.bar.doing(f"{chosen.name}: starting the server")
    stack.callback(server.stop)
    server.start()
    return _Running(chosen, server)


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
    ok = [not error for error in details["errors"]]
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
        "ttfts_ms": [round(t * 1e3, 3) for t, good in zip(details["ttfts"], ok, strict=True) if good],
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


def _warm_up(server: Server, num_prompts: int) -> None:
    """Random token ids, so that they begin no prompt of any dataset; twice, so that loading is warm as well."""
    rng = random.Random("kvlab warm-up")
    for _ in range(num_prompts):
        ids = [rng.randrange(1000, 20000) for _ in range(WARMUP_TOKENS)]
        for _ in range(2):
            server.complete(ids, 4)


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
