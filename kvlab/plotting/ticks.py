"""Ticks of logarithmic axes: round numbers written short, in place of powers and of digits without their power."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

FEW, MANY = 3, 8  # of so many ticks an axis is read with ease
STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))  # within a power of ten, coarse to fine
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def log_ticks(values: Iterable[float]) -> list[float]:
    """Round numbers that span positive `values`, eight at most.

    >>> log_ticks([2, 900_000])
    [1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0, 1000000.0]
    >>> log_ticks([8, 400])
    [3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = min(positive), max(positive)
    for steps in STEPS:
        marks = [step * 10.0**power for power in range(*_powers(low, high)) for step in steps]
        inside = [mark for mark in marks if low <= mark <= high]
        if len(inside) >= FEW:
            break
    below, above = max(mark for mark in marks if mark <= low), min(mark for mark in marks if mark >= high)
    found = [mark for mark in marks if below <= mark <= above]
    return found[:: math.ceil(len(found) / MANY)]


def short(value: float) -> str:
    """A number as on an axis.

    >>> [short(value) for value in (0.25, 20, 15_000, 2e6, 1e12)]
    ['0.25', '20', '15k', '2M', '1T']
    """
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def tidy_log_axes(figure: "go.Figure") -> None:
    """Give each logarithmic axis of `figure` round ticks; one that has ticks of its own keeps them."""
    for letter in "xy":
        for axis in figure.select_xaxes() if letter == "x" else figure.select_yaxes():
            if axis.type != "log" or axis.tickvals is not None or axis.dtick is not None:
                continue
            name = axis.plotly_name.replace("axis", "")
            ticks = log_ticks(_drawn(figure, letter, name))
            if ticks:
                axis.update(tickvals=ticks, ticktext=[short(tick) for tick in ticks])


def _powers(low: float, high: float) -> tuple[int, int]:
    return math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1  # of ten, on both sides


def _drawn(figure: "go.Figure", letter: str, axis: str) -> Iterable[float]:
    for trace in figure.data:
        if (getattr(trace, f"{letter}axis", None) or letter) == axis:
            yield from (float(value) for value in _numbers(getattr(trace, letter, None)))


def _numbers(values: Any) -> Iterable[float]:
    return (value for value in (() if values is None else values) if not isinstance(value, str) and value is not None)
