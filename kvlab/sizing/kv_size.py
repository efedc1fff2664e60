"""`KVSize`: how big the KV of one model is, with the ways to show it and to plan with it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvlab.installed import needed
from kvlab.sizing.curve import KVCurve
from kvlab.sizing.planning import Breakeven, Cost, TierPlan, breakeven, cost, plan_tier
from kvlab.sizing.report import as_dict, explain, html, layer_row
from kvlab.sizing.reserved import Reserved, reserve
from kvlab.stores.spec import TierSpec
from kvlab.units import parse_tokens

if TYPE_CHECKING:
    import pandas as pd


class KVSize(KVCurve):
    """The answer of `size_calculator`: a `KVCurve` that explains itself, plans tiers and compares costs."""

    def per_layer(self) -> list[dict[str, Any]]:
        """One row per layer: kind, KV heads, widths, window, bytes per held token and fixed bytes, over all ranks."""
        return [layer_row(layer, self.conventions, self.tp) for layer in self.layers]

    def reserved(self, tokens: int | str, **engine: Any) -> Reserved:
        """What vLLM sets aside for one sequence of `tokens`; arguments as `kvlab.sizing.reserved.reserve`."""
        return reserve(self, parse_tokens(tokens), **engine)

    def plan(
        self, tiers: Sequence[str] | str, *, tokens: int | str = 4096, chunk_tokens: int | str = 256
    ) -> list[TierPlan]:
        """Sessions of `tokens`, chunks and tokens that each tier holds. `tiers` are URLs with a ``size``, as stores and
        vLLM's connector take them, or bare sizes of host memory. Raises ConfigError on a tier without a size in bytes.

        >>> size.plan(["memory://?size=64GiB", "redis://10.0.0.1?size=1TiB"], tokens="32k")  # doctest: +SKIP
        """
        specs = [TierSpec.parse(tier) for tier in ([tiers] if isinstance(tiers, str) else tiers)]
        return [plan_tier(self, spec, parse_tokens(tokens), parse_tokens(chunk_tokens)) for spec in specs]

    def breakeven(self, prefill_tokens_per_s: float | None = None, **how: Any) -> Breakeven:
        """Bandwidth above which loading beats recomputing; arguments as `kvlab.sizing.planning.breakeven`."""
        return breakeven(self, prefill_tokens_per_s, **how)

    def cost(self, tokens: int | str, **prices: Any) -> Cost:
        """Keeping a sequence against recomputing it, in money; arguments as `kvlab.sizing.planning.cost`."""
        return cost(self, parse_tokens(tokens), **prices)

    def explain(self) -> str:
        """The formula with this model's numbers in it, the source of the numbers, and every assumption made."""
        return explain(self)

    def to_frame(self) -> "pd.DataFrame":
        """`per_layer()` as a pandas DataFrame."""
        frame: pd.DataFrame = needed("pandas", "to_frame").DataFrame(self.per_layer()).set_index("layer")
        return frame

    def to_dict(self, tokens: int | str = 4096) -> dict[str, Any]:
        """The answer as plain JSON values, evaluated at `tokens`."""
        return as_dict(self, parse_tokens(tokens))

    def _repr_html_(self) -> str:
        return html(self)

    def __repr__(self) -> str:
        windows = "".join(f", {size:,} B/token within {window:,}" for window, size in self.windows.items())
        fixed = f", {self.fixed_bytes:,} B fixed" if self.fixed_bytes else ""
        curve = f"{self.growing_bytes:,} B/token{windows}{fixed}"
        return f"KVSize({self.name}, {self.dtype}, tp={self.tp}, pp={self.pp}: {curve})"
