"""Traffic for tests: made up, and the public traces where they lie (KVLAB_TRACES, or beside the repository)."""

import os
from functools import cache
from pathlib import Path

from kvlab.bench.generate import KINDS, generate_traffic
from kvlab.bench.trace_files import load_traffic
from kvlab.bench.traffic import Traffic

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
FOUND = {path.stem: path for path in sorted(Path(os.environ.get("KVLAB_TRACES", _BESIDE)).glob("*.jsonl"))}
NAMES = [*KINDS, *FOUND]


@cache
def traffic(name: str) -> Traffic:
    """A found trace whole; made-up traffic of 400 requests with blocks of 64 tokens."""
    if name in FOUND:
        return load_traffic(FOUND[name])
    return generate_traffic(name, 400, reuse=0.55, seed=3, block_tokens=64)
