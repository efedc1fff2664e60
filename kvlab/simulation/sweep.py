"""`sweep`: `simulate` over capacities, policies and serdes, on all cores."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from kvlab.errors import ConfigError
from kvlab.progress import Progress
from kvlab.simulation.simulate import BOUND, Policy, Trace, as_traffic, simulate
from kvlab.simulation.tiers import Tier, tier_and_policy
from kvlab.simulation.traffic import Traffic
from kvlab.simulation.workers import run_jobs
from kvlab.sizing import KVSize, size_calculator
from kvlab.stores import eviction
from kvlab.stores.eviction import policy_class, policy_name
from kvlab.system import num_cores

Tiers = Tier | str | int | Sequence[Tier | str | int]


def sweep(
    trace: Trace,
    tiers: Sequence[Tiers],
    policies: Sequence[Policy] = ("lru", "fifo", "s3fifo", "arc", "belady"),
    *,
    serdes: Sequence[str | float | None] = (None,),
    model: Any = None,
    workers: int | None = None,
    progress: bool = True,
    **how: Any,
) -> list[dict[str, Any]]:
    """One row of `simulate` for every policy, capacity and serde, in this order. Tiers whose URLs all name their own
    policy come once for all of `policies`, and once more for ``belady``.

    Parameters
    ----------
    tiers
        each one tier or a list of tiers, as `simulate` takes them.
    policies
        by name, or classes of your own, for tiers whose URL names none.
    workers
        processes; as many as this process may use cores unless told. Classes that another process cannot import, such
        as those of a notebook's cell, run in this one alone.
    progress
        show a bar (never with ``TQDM_DISABLE=1``).
    how
        the other arguments of `simulate`.

    Returns
    -------
    list
        `Simulation.row` of each run: hit rates, evictions, bytes or blocks loaded and stored; with ``cost`` also
        seconds and money.

    Raises
    ------
    ConfigError
        naming the argument

    Examples
    --------
    >>> rows = sweep("chat", ["100 blocks", "1000 blocks"], ["lru", "belady"], workers=1, progress=False)
    >>> [row["policy"] for row in rows]
    ['lru', 'lru', 'belady', 'belady']
    """
    for name, values in (("tiers", tiers), ("policies", policies), ("serdes", serdes)):
        if isinstance(values, str) or not values:
            raise ConfigError(f"{name} must be a list with at least one entry, got {values!r}")
    traffic = as_traffic(trace)
    size = model if model is None or isinstance(model, KVSize) else size_calculator(model)
    classes = [policy if policy == BOUND else _portable(policy) for policy in policies]
    named = [_named(stack) for stack in tiers]
    jobs: list[tuple[Policy, Tiers, str | float | None]] = []
    names: list[str | None] = []  # in rows; None: as the tiers' URLs name them
    own = next((number for number, policy in enumerate(classes) if policy != BOUND), None)
    for number, (policy, cls) in enumerate(zip(policies, classes, strict=True)):
        for stack, says in zip(tiers, named, strict=True):
            if all(says) and policy != BOUND and number != own:
                continue  # it would be the same run again
            jobs += [(cls, stack, serde) for serde in serdes]
            names += [policy_name(policy) if policy == BOUND or not any(says) else None] * len(serdes)
    if not all(isinstance(policy, str) or _is_importable(policy) for policy in classes):
        workers = 1
    workers = num_cores() if workers is None else workers
    shared = (traffic, {**how, "model": size})
    rows: list[dict[str, Any]] = [{}] * len(jobs)
    with Progress(len(jobs), "sweep", unit="run") if progress else contextlib.nullcontext() as bar:
        for index, row in run_jobs("kvlab.simulation.sweep:one", shared, jobs, workers=workers):
            rows[index] = row | {"policy": names[index] or row["policy"]}
            if bar is not None:
                bar.step(f"{row['policy']}, {row['tiers']}: {row['block_hit_rate']:.1%} of blocks hit")
    return rows


def _named(stack: Tiers) -> list[str | None]:
    """The policies that the URLs of its tiers name."""
    tiers = [stack] if isinstance(stack, Tier | str | int) else stack
    return [tier_and_policy(tier)[1] for tier in tiers] or [None]


def _portable(policy: Policy) -> Policy:
    """A name that every process knows, or the class: one put into `POLICIES` is known in this process alone."""
    cls = policy_class(policy, also=(BOUND,))
    return policy if cls.__module__.startswith(eviction.__name__) and isinstance(policy, str) else cls


def _is_importable(cls: type) -> bool:
    """Whether another process may import it. It may not from a module whose import is going on: that is what calls
    this sweep, and would call it again there."""
    module = sys.modules.get(cls.__module__)
    if module is None or cls.__module__ == "__main__" or getattr(module.__spec__, "_initializing", False):
        return False
    return getattr(module, cls.__qualname__, None) is cls


def one(shared: tuple[Traffic, dict[str, Any]], job: tuple[Policy, Tiers, str | float | None]) -> dict[str, Any]:
    """One job of a sweep, in whichever process."""
    (traffic, how), (policy, tiers, serde) = shared, job
    return simulate(traffic, tiers, policy=policy, serde=serde, **how).row
