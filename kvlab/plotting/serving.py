"""Figures of serving runs: how much the second run is faster, how TTFT is spread, how smooth the stream stays."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvlab.installed import needed
from kvlab.plotting import theme

if TYPE_CHECKING:
    import plotly.graph_objects as go

Row = Mapping[str, Any]


def reduction_bars(
    backends: Sequence[str],
    first_ms: Sequence[float],
    last_ms: Sequence[float],
    *,
    title: str,
    labels: Sequence[str] | None = None,
    not_loaded: Sequence[float] | None = None,
) -> "go.Figure":
    """Mean TTFT of the first and the last run side by side.

    `labels` stand above the last run's bars, by default the change, such as -47%. `not_loaded` is for each backend the
    share (of 1) of its hits that were promised and not loaded: such a bar is hatched and says so, because an answer
    from KV that was never loaded is fast and wrong.
    """
    go = needed("plotly.graph_objects", "a figure")

    figure = go.Figure()
    figure.add_bar(x=list(backends), y=list(first_ms), name="first run", marker_color=theme.FIRST)
    shown = (
        list(labels) if labels is not None else [f"{b / a - 1:+.0%}" for a, b in zip(first_ms, last_ms, strict=True)]
    )
    missing = list(not_loaded or [0.0] * len(shown))
    shown = [
        f"{share:.0%} of hits<br>not loaded" if share else text for text, share in zip(shown, missing, strict=True)
    ]
    colors = [theme.color(name) or theme.BLUE for name in backends]
    look = {"color": colors, "pattern": {"shape": ["/" if share else "" for share in missing], "fillmode": "replace"}}
    bar = {"marker": look, "text": shown, "textposition": "outside", "cliponaxis": False}
    figure.add_bar(x=list(backends), y=list(last_ms), name="second run", **bar)
    figure.update_layout(barmode="group").update_yaxes(title="mean TTFT (ms)")
    return theme.styled(figure, title)


def ttft_cdf(rows: Iterable[Row], *, title: str) -> "go.Figure":
    """Share of requests answered within a time; one line a row, a backend's first run dotted."""
    go = needed("plotly.graph_objects", "a figure")

    figure = go.Figure()
    for row in rows:
        color = theme.color(row["backend"])
        times = sorted(ttft for ttft in row["ttfts_ms"] if ttft is not None)  # a failed request has none
        shares = [(n + 1) / len(row["ttfts_ms"]) for n in range(len(times))]
        line = {"color": color, "dash": "dot" if row["run"] == 1 else "solid", "shape": "hv"}
        figure.add_scatter(x=times, y=shares, mode="lines", line=line, name=f"{row['backend']}, run {row['run']}")
    figure.update_xaxes(title="TTFT (ms)", type="log")
    figure.update_yaxes(title="share of requests", tickformat=".0%", range=[0, 1.03])
    return theme.styled(figure, title)


def itl_over_time(rows: Iterable[Row], *, title: str) -> "go.Figure":
    """p99 inter-token latency of each second of a run; a stall shows as a peak."""
    go = needed("plotly.graph_objects", "a figure")

    figure = go.Figure()
    for row in rows:
        steps = row["itl_over_time"]
        name = f"{row['backend']}, run {row['run']}"
        line = {"color": theme.color(row["backend"])}
        seconds, worst = [step[0] for step in steps], [step[2] for step in steps]
        figure.add_scatter(x=seconds, y=worst, mode="lines", line=line, name=name)
    figure.update_xaxes(title="seconds since the first request")
    figure.update_yaxes(title="p99 ITL (ms)", rangemode="tozero")
    return theme.styled(figure, title)
