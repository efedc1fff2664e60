"""What a tier worker tells of its tiers: to its engine now and then, and in a line of the log at the start."""

import logging
from itertools import islice
from typing import Any

from kvlab.container import MAX_DIGITS
from kvlab.stores import Store
from kvlab.units import format_bytes

logger = logging.getLogger("kvlab.tiers")
NO_BUDGET = 1 << 60  # as of a bucket
MOST_NUMBER = 10**MAX_DIGITS - 1  # that a message may hold
MOST_LISTED = 10_000  # keys of the start-up line; listing more takes a while


def shown(row: dict[str, Any]) -> dict[str, Any]:
    fields = ("used_bytes", "max_bytes", "evictions", "get_bytes", "put_bytes")
    numbers = {field: min(int(row.get(field, 0)), MOST_NUMBER) for field in fields}  # a bucket's budget has 19 digits
    return {"tier": str(row["tier"]), "up": int(bool(row.get("up", 1))), **numbers}


def log_tiers(store: Store, prefix: str) -> None:
    """The start-up line: what each tier holds, and how many of its objects are of the engine's namespace, which keys
    with `prefix` are."""
    try:
        rows = store.rows()
        listed = list(islice(store.keys(), MOST_LISTED + 1))
    except BaseException as error:  # a store of another package may raise what is no Exception
        logger.warning("kvlab: the secondary tiers could not be listed: %s", type(error).__name__)
        return
    found = sum(key.startswith(prefix) for key in listed[:MOST_LISTED])
    more = " or more" if len(listed) > MOST_LISTED else ""
    tiers = ", ".join(f"{row['tier']} {held(row)}" for row in rows)
    logger.info("kvlab: %s; %d%s objects of namespace %s found", tiers, found, more, prefix.strip(":"))


def held(row: dict[str, Any]) -> str:
    """What a tier holds, or that it is down, in words."""
    if not row.get("up", 1):
        return f"is down ({row.get('last_error') or 'no answer'})"
    used, most = row.get("used_bytes", 0), row.get("max_bytes", 0)
    return f"holds {format_bytes(used)}" + (f" of {format_bytes(most)}" if most < NO_BUDGET else "")
