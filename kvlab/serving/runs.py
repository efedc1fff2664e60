"""Serving runs: start a server with a backend, run vLLM's benchmark client several times, collect rows, stop it all."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvlab.datasets.demo_model import demo_model
from kvlab.errors import ConfigError
from kvlab.machine.provenance import gpu_name
from kvlab.progress import Progress
from kvlab.serving import client, preflight
from kvlab.serving.backends import NAMES
from kvlab.serving.leaving import Leaving
from kvlab.serving.measuring import Row, measure
from kvlab.serving.plan import Plan, Traffic
from kvlab.serving.running import backend_of
from kvlab.serving.workloads import KINDS, check_kind, make_workload
from kvlab.units import parse_bytes

logger = logging.getLogger("kvlab")
NO_REDIS, NO_SOCKET = "redis://127.0.0.1:1", "/kvlab.sock"  # for settings that are only checked


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
    restart: bool = False,
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
        there is an NVIDIA GPU, else 16 and 1.
    output_len
        tokens to generate for each prompt; default the dataset's where there is an NVIDIA GPU, else 32.
    runs
        how often the same prompts are sent to the same server. The first fills the cache, later ones use it.
    together
        start all servers first and let their runs take turns, so that a machine that grows slower or faster
        does so for all alike. All must fit beside each other: give ``--kv-cache-memory-bytes``, as vLLM measures what
        is free wrongly while others start; and the disk and Redis of one are not at rest while another starts.
    restart
        start each server again between its runs, on the tier that it leaves (files, a Redis, a cache beside it): what
        is found after a restart. Warm-up prompts are sent again, too.
    cache_size
        bytes of each backend's tier; default 20GiB where there is an NVIDIA GPU, else 2GiB.
    settings
        of kvlab's connector, see `ConnectorConfig`. `server_flags` and `env` go to every server alike (on a CPU with
        ``--enforce-eager`` and a size of the pool, unless a flag says otherwise),
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
    output_len = preflight.usual_output_len() if output_len is None else output_len
    if runs < 1 or min(rates) <= 0:
        raise ConfigError(f"runs and request_rate must be positive, got {runs} and {min(rates)}")
    if together and port is not None:
        raise ConfigError("servers that run together cannot share a port; give none for free ones")
    if restart and len(datasets) > 1:
        raise ConfigError("a restart is measured with one dataset: runs of others would lie between")
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
        chosen = [backend_of(name, size, place / "tier", redis_url or NO_REDIS, settings, NO_SOCKET) for name in names]
        preflight.check(names, cache_bytes=size, redis_url=redis_url, together=together, out=out)
        own = preflight.pool_flags(server_flags, backend_flags or {}, len(names) if together else 1)
        own += preflight.eager_flags(server_flags, backend_flags or {})
        model = demo_model(model)
        if tell is not None:
            tell(preflight.plan_line([one.name for one in chosen], runs, datasets, counts, rates, output_len))
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
            server_flags=(*server_flags, *own),
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
            restart=restart,
        )
        numbered = list(enumerate(names))
        for group in [numbered] if together else [[one] for one in numbered]:
            rows += measure(plan, group)
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
