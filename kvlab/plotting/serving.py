"""Figures of serving runs: how much the second run is faster, how TTFT is spread, how smooth the stream stays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]
FIRST, LAST = "#9aa5b1", "#2f6db5"


def reduction_bars(
    backends: Sequence[str],
    first_ms: Sequence[float],
    last_ms: Sequence[float],
    *,
    title: str,
    labels: Sequence[str] | None = None,
) -> "go.Figure":
    """Mean TTFT of the first and the last run side by side. `labels` stand above the last run's bars, such as -47%."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_bar(x=list(backends), y=list(first_ms), name="first run", marker_color=FIRST)
    shown = (
        list(labels) if labels is not None else [f"{b / a - 1:+.0%}" for a, b in zip(first_ms, last_ms, strict=True)]
    )
    figure.add_bar(
        x=list(backends), y=list(last_ms), name="second run", marker_color=LAST, text=shown, textposition="outside"
    )
    figure.update_layout(
        title=title, yaxis_title="mean TTFT (ms)", barmode="group", template="plotly_white", height=420
    )
    return figure


def ttft_cdf(rows: Iterable[Row], *, title: str) -> "go.Figure":
    """Share of requests answered within a time; one line a row, a backend's first run dotted."""
    import plotly.colors
    import plotly.graph_objects as go

    figure = go.Figure()
    colors: dict[str, str] = {}
    for row in rows:
        color = colors.setdefault(row["backend"], plotly.colors.qualitative.D3[len(colors) % 10])
        times = sorted(row["ttfts_ms"])
        shares = [(n + 1) / len(times) for n in range(len(times))]
        line = {"color": color, "dash": "dot" if row["run"] == 1 else "solid", "shape": "hv"}
        figure.add_scatter(x=times, y=shares, mode="lines", line=line, name=f"{row['backend']}, run {row['run']}")
    figure.update_layout(title=title, template="plotly_white", height=420)
    figure.update_xaxes(title="TTFT (ms)", type="log")
    figure.update_yaxes(title="share of requests", tickformat=".0%", range=[0, 1.03])
    return figure


def itl_over_time(rows: Iterable[Row], *, title: str) -> "go.Figure":
    """p99 inter-token latency of each second of a run; a stall shows as a peak."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for row in rows:
        steps = row["itl_over_time"]
        name = f"{row['backend']}, run {row['run']}"
        figure.add_scatter(x=[step[0] for step in steps], y=[step[2] for step in steps], mode="lines", name=name)
    figure.update_layout(title=title, template="plotly_white", height=380)
    figure.update_xaxes(title="seconds since the first request")
    figure.update_yaxes(title="p99 ITL (ms)", rangemode="tozero")
    return figure
