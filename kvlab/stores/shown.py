"""How stores show themselves: as the call that makes such another, and as a table in a notebook."""

import inspect
from collections.abc import Mapping, Sequence
from html import escape

from kvlab.units import format_bytes


def call_of(made: object, *args: object, **options: object) -> str:
    """`made` as the call of its class with these arguments; options that are as by default are left out."""
    parameters = inspect.signature(type(made).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    given = [f"{name}={value!r}" for name, value in options.items() if value != defaults.get(name)]
    return f"{type(made).__name__}({', '.join([*map(repr, args), *given])})"


def table_of(title: str, rows: Sequence[Mapping[str, int | float | str]]) -> str:
    """Tiers as HTML: `rows` as `Store.rows` gives them."""
    cells = [["tier", "used", "of", "puts", "hits", "misses", "evictions"]]
    for row in rows:
        counts = [f"{row.get(name, 0):,}" for name in ("puts", "hits", "misses", "evictions")]
        sizes = [format_bytes(int(row.get(name, 0))) for name in ("used_bytes", "max_bytes")]
        cells.append([str(row.get("tier", "")), *sizes, *counts])
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in cells]
    return f"<code>{escape(title)}</code><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
