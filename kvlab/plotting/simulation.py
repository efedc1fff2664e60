"""Figures from rows of `simulate` and `sweep`; each takes rows and returns a plotly figure."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvlab.installed import needed
from kvlab.plotting import theme
from kvlab.simulation.prediction import TOLERANCE
from kvlab.simulation.simulate import BOUND

if TYPE_CHECKING:
    import plotly.graph_objects as go

Rows = Sequence[Mapping[str, Any]]


def hit_rate_figure(rows: Rows, title: str, *, by: str = "policy", rate: str = "block_hit_rate") -> "go.Figure":
    """Hit rate against capacity, one line per value of column `by`; the bound is dashed."""
    figure = _lines(rows, title, by, lambda row: 100 * row[rate])
    return figure.update_yaxes(title=f"{rate.replace('_', ' ')} (%)", rangemode="tozero")


def headroom_figure(rows: Rows, title: str) -> "go.Figure":
    """Percentage points between each policy and the bound, against capacity; `rows` must hold the bound's."""
    bound = {row["capacity"]: row["block_hit_rate"] for row in rows if row["policy"] == BOUND}
    others = [row for row in rows if row["policy"] != BOUND]
    figure = _lines(others, title, "policy", lambda row: 100 * (bound[row["capacity"]] - row["block_hit_rate"]))
    return figure.update_yaxes(title="below the bound (percentage points)", rangemode="tozero")


def cost_figure(rows: Rows, title: str, *, by: str = "policy") -> "go.Figure":
    """Money spent on GPUs and storage against TTFT saved, one line per value of `by`; needs rows with a cost model."""
    go = needed("plotly.graph_objects", "a figure")

    figure = go.Figure()
    for value, mine in _grouped(rows, by).items():
        figure.add_scatter(
            x=[row["gpu_cost"] + row["storage_cost"] for row in mine],
            y=[row["ttft_saved_ms"] for row in mine],
            text=[row["tiers"] for row in mine],
            name=str(value),
            mode="lines+markers",
        )
    figure.update_xaxes(title="cost of GPUs and storage for this traffic")
    figure.update_yaxes(title="TTFT saved per request (ms, mean)")
    return theme.styled(figure, title)


def reuse_figure(histogram: Rows, title: str, block_tokens: int) -> "go.Figure":
    """Share of block accesses by reuse distance (rows of `Simulation.reuse`); first uses stand apart on the right."""
    go = needed("plotly.graph_objects", "a figure")

    first, again = histogram[0], histogram[1:]
    labels = [_short(int(row["below_blocks"]) * block_tokens) for row in again]
    figure = go.Figure()
    figure.add_bar(x=labels, y=[100 * row["share"] for row in again], name="used again")
    figure.add_bar(x=["never before"], y=[100 * first["share"]], name="first use", marker_color=theme.FIRST)
    figure.update_xaxes(title="tokens of other prompts in between: below", type="category")
    figure.update_yaxes(title="share of block accesses (%)")
    return theme.styled(figure, title)


def predicted_figure(rows: Rows, title: str) -> "go.Figure":
    """TTFT against prompt length, measured and predicted (rows of `predict`); bars span 15% about what was measured."""
    go = needed("plotly.graph_objects", "a figure")

    figure = go.Figure()
    for how, mine in _grouped(rows, "how").items():
        color = theme.color(how)
        tokens = [row["tokens"] for row in mine]
        told, seen = ([row[f"{name}_ms"] for row in mine] for name in ("predicted", "measured"))
        near = {"type": "percent", "value": 100 * TOLERANCE}
        open_mark, full_mark = ({"symbol": s, "size": 9, "color": color} for s in ("circle-open", "circle"))
        figure.add_scatter(x=tokens, y=told, name=f"{how}, predicted", mode="markers", marker=open_mark)
        figure.add_scatter(x=tokens, y=seen, name=f"{how}, measured", mode="markers", marker=full_mark, error_y=near)
    lengths = sorted({row["tokens"] for row in rows})
    figure.update_xaxes(
        type="log", title="tokens of the prompt", tickvals=lengths, ticktext=[f"{n:,}" for n in lengths]
    )
    figure.update_yaxes(type="log", title="TTFT (ms)", tickvals=[n * 10**k for k in range(5) for n in (1, 2, 5)])
    return theme.styled(figure, title)


def _lines(rows: Rows, title: str, by: str, value: Callable[[Mapping[str, Any]], float]) -> "go.Figure":
    go = needed("plotly.graph_objects", "a figure")

    figure = go.Figure()
    unit = rows[0]["unit"]
    scale = 2**30 if unit == "bytes" else 1
    for name, mine in _grouped(rows, by).items():
        mine = sorted((row for row in mine if row["capacity"] is not None), key=lambda row: row["capacity"])
        figure.add_scatter(
            x=[row["capacity"] / scale for row in mine],
            y=[value(row) for row in mine],
            name=str(name),
            mode="lines+markers",
            line={"color": theme.color(str(name)), "dash": "dash" if name == BOUND else "solid"},
        )
    figure.update_xaxes(type="log", title=f"capacity ({'GiB' if unit == 'bytes' else 'blocks'})")
    return theme.styled(figure, title)


def _grouped(rows: Rows, by: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row)
    return groups


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:.3g}M" if tokens >= 10**6 else f"{tokens / 1e3:.3g}k" if tokens >= 1000 else str(tokens)
