"""Serving runs: start a server with a backend, run vLLM's benchmark client several times, collect rows, stop it all."""

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.bench import client, counters, latency, peers
from kvlab.bench.demo_model import demo_model
from kvlab.bench.origin import filesystem, gpu_name, origin
from kvlab.bench.processes import usage
from kvlab.bench.redis_server import RedisServer
from kvlab.bench.server import Server
from kvlab.bench.workloads import Workload, make_workload
from kvlab.errors import ConfigError
from kvlab.stores import open_store
from kvlab.units import parse_bytes

Row = dict[str, Any]
WARMUP_TOKENS = 300  # more than one chunk of 256, so that both a chunk and a tail are stored and loaded


@dataclass(frozen=True)
class Plan:
    """What every backend of one comparison shares."""

    model: str
    workload: Workload
    request_rate: float
    runs: int
    seed: int
    server_flags: tuple[str, ...]
    env: Mapping[str, str]
    port: int | None
    ignore_eos: bool
    warmups: int
    start_timeout_s: float
    folder: Path
    say: Callable[[str], None]
    client: client.Client


def run(
    backend: str | Sequence[str] | None = None,
    peer: str | Sequence[str] | None = None,
    *,
    model: str | None = None,
    dataset: str = "sharegpt",
    dataset_path: str | None = None,
    num_prompts: int = 1024,
    request_rate: float = 16.0,
    runs: int = 2,
    seed: int = 0,
    output_len: int | None = None,
    max_prompt_tokens: int = 8192,
    cache_size: str | int | None = None,
    redis_url: str | None = None,
    settings: Mapping[str, Any] | None = None,
    server_flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    port: int | None = None,
    ignore_eos: bool = False,
    warmups: int = 2,
    start_timeout_s: float = 600.0,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure `backend` and then each `peer` on the same prompts at the same times; one row per run.

    Parameters
    ----------
    backend : a store URL or several, fastest first, for kvlab over those tiers; or a name of `kvlab.bench.peers.NAMES`.
    peer : names of that list, measured after it. The server is started anew for each.
    model : folder or hub id; None is the small demo model.
    dataset : ``sharegpt``, ``rounds``, ``documents`` or ``trace``; `dataset_path` is the user's own file.
    request_rate : requests per second, Poisson arrivals; a trace brings its own times.
    runs : how often the same prompts are sent to the same server. The first fills the cache, later ones use it.
    cache_size : bytes of each backend's tier; default 20GiB where there is an NVIDIA GPU, else 2GiB.
    settings : of kvlab's connector, see `ConnectorConfig`. `server_flags` and `env` go to every server alike.
    warmups : random prompts of 300 tokens, each sent twice before the first run; they share nothing with the dataset.
    folder : where disk tiers, logs and detailed results go, and stay. None: a temporary folder, removed at the end.
    out : a file of JSON lines; rows are appended as they come.

    Raises ConfigError or StoreError in one line. Whatever happens, an interrupt too, nothing it started stays behind.
    """
    names = [*([backend] if backend is not None else []), *([peer] if isinstance(peer, str) else peer or [])]
    if not names:
        raise ConfigError(f"give a backend: a store URL, or one of {', '.join(peers.NAMES)}")
    if runs < 1 or request_rate <= 0:
        raise ConfigError(f"runs and request_rate must be positive, got {runs} and {request_rate}")
    tell = say or _say
    size = parse_bytes(cache_size if cache_size is not None else ("20GiB" if gpu_name() else "2GiB"))
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        if folder is None:
            place = Path(tempfile.mkdtemp(prefix="kvlab-bench-"))
            stack.callback(shutil.rmtree, place, ignore_errors=True)
        else:
            place = Path(folder).resolve()
            place.mkdir(parents=True, exist_ok=True)
        for name in names:  # refuse a wrong name or URL before anything is downloaded or started
            _backend(name, size, place / "tier", redis_url or "redis://127.0.0.1:1", settings)
        model = demo_model(model)
        measuring = stack.enter_context(client.Client(place / "client.log"))
        tell(f"making the {dataset} workload")
        workload = make_workload(
            dataset,
            place,
            tokenizer=model,
            path=dataset_path,
            num_prompts=num_prompts,
            seed=seed,
            output_len=output_len,
            max_prompt_tokens=max_prompt_tokens,
        )
        if workload.num_prompts < num_prompts:
            tell(f"the dataset has {workload.num_prompts} prompts that fit, not {num_prompts}; none is sent twice")
        plan = Plan(
            model,
            workload,
            request_rate,
            runs,
            seed,
            tuple(server_flags),
            dict(env or {}),
            port,
            ignore_eos,
            warmups,
            start_timeout_s,
            place,
            tell,
            measuring,
        )
        for number, name in enumerate(names):
            rows += _measure(plan, name, number, size, redis_url, settings, out)
    return rows


def _backend(
    name: str | Sequence[str], size: int, folder: Path, redis_url: str | None, settings: Mapping[str, Any] | None
) -> peers.Backend:
    if isinstance(name, str) and "://" not in name:
        return peers.backend(name, cache_bytes=size, folder=folder, redis_url=redis_url, settings=settings)
    return peers.from_tiers([name] if isinstance(name, str) else list(name), settings=settings)


def _measure(
    plan: Plan,
    name: str | Sequence[str],
    number: int,
    size: int,
    redis_url: str | None,
    settings: Mapping[str, Any] | None,
    out: str | Path | None,
) -> list[Row]:
    """All runs of one backend, on a server of its own and an empty tier."""
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        if name in peers.NEEDS_REDIS and redis_url is None:
            redis_url = stack.enter_context(RedisServer(f"maxmemory {size}")).url
        tier = plan.folder / f"tier-{number}"
        chosen = _backend(name, size, tier, redis_url, settings)
        if chosen.folder == tier:
            tier.mkdir(parents=True, exist_ok=True)
            stack.callback(shutil.rmtree, tier, ignore_errors=True)
        log = plan.folder / f"server-{number}-{chosen.name.replace(' ', '-')}.log"
        server = Server(
            plan.model,
            (*plan.server_flags, *chosen.flags),
            port=plan.port,
            env={**chosen.env, **plan.env},
            log=log,
            timeout_s=plan.start_timeout_s,
        )
        began = time.monotonic()
        plan.say(f"{chosen.name}: starting the server")
        with server:
            start_s = time.monotonic() - began
            plan.say(f"{chosen.name}: healthy after {start_s:.0f} s")
            _warm_up(server, plan.warmups)
            for turn in range(1, plan.runs + 1):
                row = _one_run(plan, server, chosen, turn)
                row |= {"server_start_s": round(start_s, 1), "cache_bytes": size} | origin()
                if out is not None:
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                rows.append(row)
                plan.say(
                    f"{chosen.name}: run {turn}/{plan.runs}: TTFT mean {row['mean_ttft_ms']:.1f} ms,"
                    f" p99 {row['p99_ttft_ms']:.1f} ms; TPOT mean {row['mean_tpot_ms']:.2f} ms;"
                    f" {row['hit_tokens']} of {row['total_input_tokens']} tokens hit"
                )
    return rows


def _one_run(plan: Plan, server: Server, chosen: peers.Backend, turn: int) -> Row:
    work = plan.workload
    args = client.arguments(
        server,
        work.args,
        num_prompts=work.num_prompts,
        request_rate=plan.request_rate,
        seed=plan.seed,
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
    return {
        "backend": chosen.name,
        "run": turn,
        "dataset": work.name,
        "model": Path(plan.model).name,
        "num_prompts": work.num_prompts,
        "request_rate": plan.request_rate if work.name != "trace" else "trace",
        "seed": plan.seed,
        **{key: details[key] for key in kept if key in details},
        **{key: round(value, 6) for key, value in latency.summary(details).items()},
        "hit_tokens": counted.get("external_prefix_cache_hits", 0) + counted.get("prefix_cache_hits", 0),
        "hit_prompts": sum(hit > 0 for hit in hits),
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


def _warm_up(server: Server, num_prompts: int) -> None:
    """Random token ids, so that they begin no prompt of any dataset; twice, so that loading is warm as well."""
    rng = random.Random("kvlab warm-up")
    for _ in range(num_prompts):
        ids = [rng.randrange(1000, 20000) for _ in range(WARMUP_TOKENS)]
        for _ in range(2):
            server.complete(ids, 4)


def _stored_bytes(chosen: peers.Backend) -> int | None:
    """Bytes that lie in the backend's lower tiers now; None where it has none that can be asked."""
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


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
