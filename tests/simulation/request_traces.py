"""Traffic for tests: made up, and the public traces where they are found."""

from functools import cache

from kvlab.simulation.generate import KINDS, generate_traffic
from kvlab.simulation.trace_files import find_traces, load_traffic
from kvlab.simulation.traffic import Traffic

FOUND = find_traces()
NAMES = [*KINDS, *FOUND]


@cache
def traffic(name: str) -> Traffic:
    """A found trace whole; made-up traffic of 400 requests with blocks of 64 tokens."""
    if name in FOUND:
        return load_traffic(FOUND[name])
    return generate_traffic(name, 400, reuse=0.55, seed=3, block_tokens=64)
