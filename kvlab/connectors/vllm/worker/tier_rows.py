"""What the secondary tiers hold and did: asked now and then, away from the engine's steps."""

import logging
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from kvlab.connectors.vllm.messages import TierRow
from kvlab.engine import CacheEngine
from kvlab.stores import Store
from kvlab.threads import Threads
from kvlab.units import format_bytes

logger = logging.getLogger("vllm.kvlab")
INTERVAL_S = 10.0
NO_BUDGET = 1 << 60  # as of a bucket
MOST_LISTED = 10_000  # keys of the start-up line; listing more takes an engine's time


class TierRows:
    """Asks `store.rows()` in `pool` every `INTERVAL_S` while the engine runs; `report` gets each tier's row."""

    def __init__(self, store: Store, pool: Threads, report: Callable[[dict[str, TierRow]], None]) -> None:
        self._store = store
        self._pool = pool
        self._report = report
        self._before: dict[str, TierRow] = {}
        self._is_asked = False
        self._next_s = 0.0

    def begin_step(self) -> None:
        if not self._is_asked and (now := time.monotonic()) >= self._next_s:
            self._is_asked, self._next_s = True, now + INTERVAL_S
            self._pool.submit(self._ask)

    def _ask(self) -> None:
        try:
            rows = named(self._store.rows())
            self._report({name: increments(row, self._before.get(name, TierRow())) for name, row in rows.items()})
            self._before = rows
        except BaseException as error:  # a store of another package may raise what is no Exception
            logger.debug("kvlab: the tiers gave no counters: %s", type(error).__name__)
        finally:
            self._is_asked = False


def named(rows: list[dict[str, Any]]) -> dict[str, TierRow]:
    """Rows of `Store.rows` by tier; a second tier of one name gets a number."""
    found: dict[str, TierRow] = {}
    for row in rows:
        name, number = str(row["tier"]), 2
        while name in found:
            name, number = f"{row['tier']}{number}", number + 1
        counts = {
            field: row.get(field, 0) for field in ("used_bytes", "max_bytes", "evictions", "get_bytes", "put_bytes")
        }
        found[name] = TierRow(**counts, up=bool(row.get("up", 1)))
    return found


def increments(row: TierRow, before: TierRow) -> TierRow:
    """`row` with its counters since `before`; what a tier holds stays as it is."""
    return TierRow(
        used_bytes=row.used_bytes,
        max_bytes=row.max_bytes,
        evictions=max(row.evictions - before.evictions, 0),
        get_bytes=max(row.get_bytes - before.get_bytes, 0),
        put_bytes=max(row.put_bytes - before.put_bytes, 0),
        up=row.up,
    )


def log_tiers(engine: CacheEngine) -> None:
    """The start-up line: what each secondary tier holds, and how many of its objects are of this engine's namespace."""
    prefix = engine.namespace.key(b"")
    try:
        rows = engine.store.rows()
        listed = list(islice(engine.store.keys(), MOST_LISTED + 1))
    except BaseException as error:  # a store of another package may raise what is no Exception
        logger.warning("kvlab: the secondary tiers could not be listed: %s", type(error).__name__)
        return
    found = sum(key.startswith(prefix) for key in listed[:MOST_LISTED])
    more = " or more" if len(listed) > MOST_LISTED else ""
    tiers = ", ".join(f"{row['tier']} {held(row)}" for row in rows)
    logger.info("kvlab: %s; %d%s objects of namespace %s found", tiers, found, more, prefix.strip(":"))


def held(row: dict[str, Any]) -> str:
    if not row.get("up", 1):
        return f"is down ({row.get('last_error') or 'no answer'})"
    used, most = row.get("used_bytes", 0), row.get("max_bytes", 0)
    return f"holds {format_bytes(used)}" + (f" of {format_bytes(most)}" if most < NO_BUDGET else "")
