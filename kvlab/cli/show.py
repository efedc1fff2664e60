"""What the subcommands print: tables with colours on a terminal and without them elsewhere, and JSON."""

import json
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

BOLD, DIM, GREEN, RED = "bold", "dim", "green", "red"
WIDE = 10_000  # columns where no terminal has fewer


def _console() -> Console:
    """Stdout as it is now. ``NO_COLOR`` turns off all styles, of which rich would keep bold."""
    plain: dict[str, Any] = {"color_system": None} if os.environ.get("NO_COLOR") else {}
    console = Console(file=sys.stdout, highlight=False, **plain)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=WIDE)


def styled(text: str, *styles: str) -> str:
    """`text` in a style, on a terminal."""
    return _rendered(Text(text, " ".join(styles), end="")) if text else text


def table(rows: Sequence[Sequence[str]], *, left: int = 0, best: Collection[tuple[int, int]] = ()) -> str:
    """Lines of cells, the first of headings. The first `left` columns begin on the left, the others end on the right;
    cells (row, column) of `best` are marked."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=BOLD)
    for at, heading in enumerate(rows[0]):
        made.add_column(Text(heading), justify="left" if at < left else "right", no_wrap=True, overflow="fold")
    for number, row in enumerate(rows[1:], start=1):
        made.add_row(*(Text(cell, GREEN if (number, at) in best else "") for at, cell in enumerate(row)))
    return "\n".join(line.rstrip() for line in _rendered(made).splitlines())


def _rendered(what: Any) -> str:
    console = _console()
    with console.capture() as captured:
        console.print(what, end="", soft_wrap=isinstance(what, Text))
    return captured.get()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
