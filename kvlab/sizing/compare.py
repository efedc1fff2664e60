"""`compare_sizes`: several models side by side, as a table and as a figure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from kvlab.errors import ConfigError
from kvlab.installed import needed
from kvlab.sizing.calculator import size_calculator
from kvlab.sizing.kv_size import KVSize
from kvlab.units import format_bytes, parse_tokens

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

LENGTHS: tuple[int, ...] = tuple(1024 * 2**i for i in range(8))  # 1k to 128k


@dataclass(frozen=True)
class Comparison:
    """Sizes of several models at several lengths."""

    sizes: tuple[KVSize, ...]
    lengths: tuple[int, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per model: name, dtype, the curve's three figures, and bytes at each length."""
        return [
            {
                "model": size.name,
                "dtype": size.dtype,
                "growing_bytes": size.growing_bytes,
                "windows": "; ".join(f"{per_token:,} within {window:,}" for window, per_token in size.windows.items()),
                "fixed_bytes": size.fixed_bytes,
                **{f"bytes_at_{n}": size.at(n) for n in self.lengths},
                "source_kind": size.config.source_kind,
            }
            for size in self.sizes
        ]

    def to_frame(self) -> "pd.DataFrame":
        """`rows` as a pandas DataFrame."""
        frame: pd.DataFrame = needed("pandas", "to_frame").DataFrame(self.rows).set_index("model")
        return frame

    def figure(self, title: str = "KV bytes of one sequence") -> "go.Figure":
        """Bytes over length, one line per model, both axes logarithmic; needs plotly."""
        go = needed("plotly.graph_objects", "a figure")

        figure = go.Figure()
        for size in self.sizes:
            sizes = [size.at(n) for n in self.lengths]
            hover = [f"{size.name}: {n:,} tokens, {format_bytes(b)}" for n, b in zip(self.lengths, sizes, strict=True)]
            figure.add_scatter(
                x=list(self.lengths),
                y=[num_bytes / 2**30 for num_bytes in sizes],
                name=size.name.rpartition("/")[2],
                mode="lines+markers",
                hovertext=hover,
                hoverinfo="text",
            )
        ticks = [n for n in self.lengths if n >= 1024]
        figure.update_xaxes(type="log", title="tokens", tickvals=ticks, ticktext=[f"{n // 1024}k" for n in ticks])
        figure.update_yaxes(type="log", title="KV of one sequence (GiB)")
        return figure.update_layout(title=title)

    def _repr_html_(self) -> str:
        shown = [n for n in self.lengths if n in (1024, 4096, 32768, 131072)] or list(self.lengths[:4])
        head = "".join(f"<th>{escape(cell)}</th>" for cell in ("model", "dtype", *(f"{n:,} tokens" for n in shown)))
        body = "".join(
            f"<tr><td style='text-align:left'>{escape(size.name)}</td><td>{escape(size.dtype)}</td>"
            + "".join(f"<td style='text-align:right'>{format_bytes(size.at(n))}</td>" for n in shown)
            + "</tr>"
            for size in self.sizes
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def compare_sizes(models: Iterable[Any], lengths: Sequence[int | str] = LENGTHS, **how: Any) -> Comparison:
    """Sizes of several models at several lengths, as rows, a table and a figure.

    Parameters
    ----------
    models
        each as `size_calculator` takes it, or a `KVSize`
    lengths
        tokens of one sequence: numbers, or text such as ``"32k"``
    how
        passed to `size_calculator`: ``dtype``, ``tp``, ``engine``, ...

    Raises
    ------
    ConfigError
        for an empty list, and what `size_calculator` raises

    Examples
    --------
    >>> compare_sizes(["Qwen2.5-7B", "DeepSeek-V3"], ["1k"]).rows[0]["bytes_at_1024"]
    58720256
    """
    if isinstance(models, str):
        raise ConfigError(f"compare_sizes takes a list of models, got the string {models!r}; try [{models!r}]")
    sizes = tuple(model if isinstance(model, KVSize) else size_calculator(model, **how) for model in models)
    if not sizes:
        raise ConfigError("compare_sizes needs at least one model")
    return Comparison(sizes, tuple(parse_tokens(n) for n in lengths))
