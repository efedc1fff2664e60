"""What is sent to every server of a comparison, and what its servers share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.progress import Progress
from kvlab.serving.client import Client
from kvlab.serving.workloads import Workload


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
    client: Client
    cache_bytes: int
    redis_url: str | None
    settings: Mapping[str, Any] | None
    out: str | Path | None
    restart: bool = False
