"""`KVSize`: how big the KV of one model is, with the ways to show it and to plan with it."""

from typing import TYPE_CHECKING, Any

from kvlab.sizing.curve import KVCurve
from kvlab.sizing.planning import Breakeven, Cost, TierPlan, breakeven, cost, plan_tier
from kvlab.sizing.report import as_dict, explain, html, layer_row
from kvlab.sizing.reserved import Reserved, reserve
from kvlab.units import parse_bytes, parse_tokens

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

    def plan(self, tiers: dict[str, int | str], *, tokens: int | str = 4096, chunk: int = 256) -> list[TierPlan]:
        """Sessions, chunks and tokens that each tier (name -> size) holds."""
        return [plan_tier(self, tier, parse_bytes(size), parse_tokens(tokens), chunk) for tier, size in tiers.items()]

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
        import pandas as pd

        return pd.DataFrame(self.per_layer()).set_index("layer")

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
