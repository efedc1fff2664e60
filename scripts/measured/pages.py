"""What a page of measurements is, and how it is written: question, answer, goals, tables with their origin."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "data" / "measured"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """What was aimed at, what was measured, and whether that is enough."""

    text: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Table:
    """Cells made of `source`, whose rows say where they come from."""

    title: str
    head: Sequence[str]
    cells: Sequence[Sequence[str]]
    source: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Page:
    name: str
    question: str
    answer: str
    tables: Sequence[Table]
    goals: Sequence[Goal] = ()
    reading: str = ""
    files: Sequence[str] = field(default=())


def read(name: str) -> list[dict[str, Any]]:
    """All rows of a file of data/measured/."""
    path = DATA / name
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


def num(value: Any, digits: int = 2) -> str:
    """A cell: so many digits after the point, thousands apart; empty for what is not there."""
    return "" if value in ("", None) else f"{float(value):,.{digits}f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}"


def interval(row: Row, name: str, digits: int = 3) -> str:
    """A ratio to the engine without hooks, with its 95% interval where the row has one."""
    value, low, high = (row.get(f"{name}_{end}") for end in ("over_off", "low", "high"))
    return num(value, digits) + (f" ({num(low, digits)} to {num(high, digits)})" if low else "")


def pivot(
    rows: Iterable[Row], row: str, column: str, cell: Callable[[Row], str], order: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table with one line for each value of `row`, in the order of the rows (columns: of `order`)."""
    found: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = dict.fromkeys(order)
    for each in rows:
        found.setdefault(each[row], {})[each[column]] = cell(each)
        columns.setdefault(each[column])
    return [row, *columns], [[name, *(cells.get(c, "") for c in columns)] for name, cells in found.items()]


def rendered(page: Page) -> str:
    lines = [f"# {page.question}", "", page.answer, ""]
    if page.goals:
        lines += ["| goal | measured | met |", "|---|---|---|"]
        lines += [f"| {goal.text} | {goal.measured} | {'yes' if goal.met else '**no**'} |" for goal in page.goals]
        lines.append("")
    for table in page.tables:
        lines += [f"## {table.title}", "", _line(table.head), _line(["---"] * len(table.head))]
        lines += [_line(cells) for cells in table.cells]
        lines += ["", *([table.note, ""] if table.note else []), *_origin(table.source), ""]
    if page.reading:
        lines += ["## How to read it", "", page.reading.strip(), ""]
    lines.append("Rows: " + ", ".join(f"`data/measured/{name}`" for name in page.files) + ".")
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _origin(rows: Sequence[Row]) -> list[str]:
    """Machine, versions, date, commit and command of the rows, each value once."""
    machines = _each(rows, _machine)
    lines = [f"*{'; '.join(machines)}*  "]
    about = [
        f"{_joined(rows, 'date')}",
        _joined(rows, "versions"),
        f"commit {_joined(rows, 'commit') or 'not recorded'}",
    ]
    lines.append(f"*{'; '.join(part for part in about if part)}*")
    commands = _each(rows, lambda row: str(row.get("command") or "").strip())
    lines += ["", *(f"    {command}" for command in commands if command)]
    return lines


def _machine(row: Row) -> str:
    if row.get("machine"):
        return str(row["machine"])
    cores = f"{row['cores']} cores" if row.get("cores") else ""
    return ", ".join(part for part in (row.get("gpu"), row.get("cpu"), cores) if part)


def _each(rows: Sequence[Row], value: Callable[[Row], str]) -> list[str]:
    return list(dict.fromkeys(value(row) for row in rows))


def _joined(rows: Sequence[Row], name: str) -> str:
    return ", ".join(each for each in _each(rows, lambda row: str(row.get(name) or "")) if each)
