"""GPU memory that outlives an engine's sleep."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def outside_pools(device: torch.device, make: Callable[[], T]) -> T:
    """What `make` returns, whose memory on `device` lies in no pool that the caller's thread allocates from.

    An engine that may sleep registers its pages while such a pool is in use, and discards the pool's memory when it
    falls asleep: a table of addresses in it would then hold anything, and kernels that read it write anywhere. A pool
    is one thread's (`torch.cuda.use_mem_pool`), so `make` runs in another. What it raises is raised here.
    """
    if device.type != "cuda":
        return make()
    torch.cuda.synchronize(device)  # the threads' streams may differ

    def made() -> T:
        with torch.cuda.device(device):
            found = make()
            torch.cuda.synchronize(device)
        return found

    with ThreadPoolExecutor(1, "kvlab-pools") as thread:
        return thread.submit(made).result()
