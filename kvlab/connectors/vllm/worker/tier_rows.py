"""What the secondary tiers hold and did, as a worker tells it: rows of stores become increments."""

from typing import Any

from kvlab.connectors.vllm.messages import TierRow


class TierRows:
    """Keeps the latest rows, so that the next ones give increments."""

    def __init__(self) -> None:
        self._before: dict[str, TierRow] = {}

    def increments(self, rows: list[dict[str, Any]]) -> dict[str, TierRow]:
        """Rows of `Store.rows` by tier, with counters since the last call."""
        found = named(rows)
        news = {name: increments(row, self._before.get(name, TierRow())) for name, row in found.items()}
        self._before = found
        return news


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
    """`row` with its counters since `before`, which another worker may have counted; what a tier holds stays."""
    return TierRow(
        used_bytes=row.used_bytes,
        max_bytes=row.max_bytes,
        evictions=max(row.evictions - before.evictions, 0),
        get_bytes=max(row.get_bytes - before.get_bytes, 0),
        put_bytes=max(row.put_bytes - before.put_bytes, 0),
        up=row.up,
    )
