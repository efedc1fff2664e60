"""A backend's server, and what runs beside it: started on an empty tier, warmed up, started again on the same tier."""

import contextlib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.machine.redis_server import RedisServer
from kvlab.serving.backends import NEEDS_REDIS, Backend, from_tiers, named_backend
from kvlab.serving.beside import BESIDE
from kvlab.serving.plan import Plan
from kvlab.serving.server import Server

WARMUP_TOKENS = 300  # more than one chunk of 256, so that both a chunk and a tail are stored and loaded
Name = str | Sequence[str]


def backend_of(
    name: Name,
    size: int,
    folder: Path,
    redis_url: str | None,
    settings: Mapping[str, Any] | None,
    beside: str = "",
) -> Backend:
    if isinstance(name, str) and "://" not in name:
        return named_backend(
            name, cache_bytes=size, folder=folder, redis_url=redis_url, beside=beside, settings=settings
        )
    return from_tiers([name] if isinstance(name, str) else list(name), settings=settings)


@dataclass
class Running:
    """A backend and its server; `start_s`: how long the server took to become healthy."""

    backend: Backend
    server: Server
    began: float
    start_s: float = 0.0

    def wait(self) -> None:
        self.server.wait()
        self.start_s = time.monotonic() - self.began

    def restart(self) -> None:
        """Another process of the server, on the tier that the first one leaves."""
        self.server.stop()
        self.began = time.monotonic()
        self.server.start()
        self.wait()


def start(stack: contextlib.ExitStack, plan: Plan, name: Name, number: int) -> Running:
    """Start a backend's server, on an empty tier; `stack` ends it and what it needs."""
    redis_url, beside = plan.redis_url, ""
    if name in NEEDS_REDIS and redis_url is None:
        redis_url = stack.enter_context(
            RedisServer(f"maxmemory {plan.cache_bytes}", "maxmemory-policy allkeys-lru")
        ).url
    if isinstance(name, str) and name in BESIDE:
        beside = stack.enter_context(BESIDE[name](plan.cache_bytes)).address
    tier = plan.folder / f"tier-{number}"
    chosen = backend_of(name, plan.cache_bytes, tier, redis_url, plan.settings, beside)
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
    return Running(chosen, server, time.monotonic())


def warm_up(server: Server, num_prompts: int) -> None:
    """Random token ids, so that they begin no prompt of any dataset; twice, so that loading is warm as well."""
    rng = random.Random("kvlab warm-up")
    for _ in range(num_prompts):
        ids = [rng.randrange(1000, 20000) for _ in range(WARMUP_TOKENS)]
        for _ in range(2):
            server.complete(ids, 4)
