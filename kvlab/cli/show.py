"""What the subcommands print: tables with colours on a terminal and without them elsewhere, and JSON."""

import json
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

BOLD, DIM, GREEN, RED = "1", "2", "32", "31"


def has_colours() -> bool:
    """Whether stdout is a terminal that shows them; ``NO_COLOR`` turns them off, as everywhere."""
    is_wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return is_wanted and sys.stdout is not None and sys.stdout.isatty()


def styled(text: str, *styles: str) -> str:
    """`text` in a style, on a terminal."""
    return f"\033[{';'.join(styles)}m{text}\033[0m" if has_colours() and text else text


def table(rows: Sequence[Sequence[str]], *, left: int = 0, best: Collection[tuple[int, int]] = ()) -> str:
    """Lines of cells, the first of headings. The first `left` columns begin on the left, the others end on the right;
    cells (row, column) of `best` are marked."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        marked = [styled(cell, GREEN) if (number, at) in best else cell for at, cell in enumerate(cells)]
        line = "  ".join(marked).rstrip()
        lines.append(styled(line, BOLD) if number == 0 else line)
    return "\n".join(lines)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
