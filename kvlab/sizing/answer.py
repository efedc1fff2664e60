"""`KVSize`: how big the KV of one model is, as a curve over the sequence length."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvlab.errors import ConfigError
from kvlab.sizing.facts import Facts, context_length
from kvlab.sizing.parallel import stages_of
from kvlab.sizing.parts import Layer, Part, Rules, StateKV, part_bytes
from kvlab.units import parse_bytes, parse_tokens

if TYPE_CHECKING:
    import pandas as pd

    from kvlab.sizing.planning import Breakeven, Cost, TierPlan
    from kvlab.sizing.reserved import Reserved

_FAR = 1 << 50  # more tokens than anything holds: the bound of searches


@dataclass(frozen=True)
class KVSize:
    """The KV of one sequence of one model: growing bytes per token, windowed parts, fixed state.

    Figures named without `rank` are sums over all `tp` ranks and `pp` stages, replicated heads and latents included;
    `rank_bytes` is what the fullest rank holds. All figures are *logical* bytes; `reserved` is what vLLM sets aside.
    `factor` (a serde's stored bytes per raw byte) scales every logical figure, rounded up to whole bytes.
    """

    facts: Facts
    layers: tuple[Layer, ...]
    rules: Rules
    tp: int = 1
    pp: int = 1
    factor: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def dtype(self) -> str:
        return self.rules.kv.name

    @property
    def context(self) -> int | None:
        """Longest context the config declares, in tokens."""
        return context_length(self.facts)

    @cached_property
    def _parts(self) -> list[tuple[Part, int]]:
        """Each distinct part as one TP rank keeps it, and how many layers keep it."""
        return [(part.shard(self.tp), n) for part, n in Counter(p for x in self.layers for p in x.parts).items()]

    def _scaled(self, num_bytes: int) -> int:
        return -(-num_bytes * self.factor.numerator // self.factor.denominator)

    def at(self, tokens: int | str) -> int:
        """Bytes of one sequence of `tokens` (4096, ``"32k"``), over all ranks."""
        n = _tokens(tokens)
        return self._scaled(self.tp * sum(part_bytes(part, n, self.rules) * count for part, count in self._parts))

    def rank_bytes(self, tokens: int | str) -> int:
        """Bytes of one sequence of `tokens` on the rank that holds most: one TP rank of the fattest PP stage."""
        n = _tokens(tokens)
        stages = ([p for x in stage for p in x.parts] for stage in stages_of(list(self.layers), self.pp))
        return self._scaled(max(sum(part_bytes(p.shard(self.tp), n, self.rules) for p in stage) for stage in stages))

    @cached_property
    def growing_bytes(self) -> int:
        """Bytes that every further token adds for ever (not counting windows), over all ranks."""
        growing = (p.token_bytes(self.rules) * n for p, n in self._parts if not p.window and p.fixed_tokens is None)
        return self._scaled(self.tp * sum(growing))

    @cached_property
    def windows(self) -> dict[int, int]:
        """Window in tokens -> bytes per token of the layers that keep only that many, over all ranks."""
        found: dict[int, int] = {}
        for part, count in self._parts:
            if part.window:
                found[part.window] = found.get(part.window, 0) + self.tp * part.token_bytes(self.rules) * count
        return {window: self._scaled(size) for window, size in sorted(found.items())}

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes that one sequence needs whatever its length: recurrent states, cross-attention."""
        return self.at(0)

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token, where one number tells all; raises ConfigError saying why where none does."""
        why = []
        if self.windows:
            why.append("layers keep a window of " + ", ".join(f"{w:,}" for w in self.windows) + " tokens only")
        if self.fixed_bytes:
            why.append(f"{self.fixed_bytes:,} bytes are fixed per sequence")
        if why:
            raise ConfigError(
                f"{self.name} has no single number of bytes per token: {' and '.join(why)}; "
                f"use at(n), or growing_bytes ({self.growing_bytes:,})"
            )
        return self.growing_bytes

    @property
    def replication(self) -> float:
        """Bytes over all TP ranks, divided by the bytes that one rank would hold alone."""
        n = 1 << 20
        alone = sum(part_bytes(part, n, self.rules) for layer in self.layers for part in layer.parts)
        return self.tp * sum(part_bytes(part, n, self.rules) * count for part, count in self._parts) / alone

    def chunk_bytes(self, tokens: int | str = 256) -> int:
        """Bytes of a stored chunk from whose end a model can go on: KV of its tokens, plus states where there are."""
        return self.at(tokens)

    def max_tokens(self, memory: int | str, *, per_rank: bool = False) -> int:
        """Longest sequence that `memory` (bytes, ``"80GiB"``) holds; `per_rank`: each rank has that much.

        0 where not even the fixed part fits. Raises ConfigError where the size stops growing, so that no longest is.
        """
        budget = parse_bytes(memory)
        size = self.rank_bytes if per_rank else self.at
        if not self.growing_bytes and size(_FAR) <= budget:
            raise ConfigError(f"{self.name} never needs more than {size(_FAR):,} bytes; any number of tokens fits")
        return _largest(lambda n: size(n) <= budget)

    def max_sequences(self, memory: int | str, tokens: int | str, *, per_rank: bool = False) -> int:
        """How many sequences of `tokens` each fit into `memory`; `per_rank`: each rank has that much."""
        each = self.rank_bytes(tokens) if per_rank else self.at(tokens)
        if each == 0:
            raise ConfigError(f"sequences of {tokens} tokens need no memory at all; give a positive number of tokens")
        return parse_bytes(memory) // each

    def per_layer(self) -> list[dict[str, Any]]:
        """One row per layer: kind, KV heads, widths, window, bytes per held token and fixed bytes, over all ranks."""
        from kvlab.sizing.report import layer_row

        return [layer_row(layer, self.rules, self.tp) for layer in self.layers]

    def reserved(self, tokens: int | str, **engine: Any) -> "Reserved":
        """What vLLM sets aside for one sequence of `tokens`; arguments as `kvlab.sizing.reserved.reserve`."""
        from kvlab.sizing.reserved import reserve

        return reserve(self, _tokens(tokens), **engine)

    def plan(self, tiers: dict[str, int | str], *, tokens: int | str = 4096, chunk: int = 256) -> "list[TierPlan]":
        """Sessions, chunks and tokens that each tier (name -> size) holds."""
        from kvlab.sizing.planning import plan_tier

        return [plan_tier(self, tier, parse_bytes(size), _tokens(tokens), chunk) for tier, size in tiers.items()]

    def breakeven(self, prefill_tokens_per_s: float | None = None, **how: Any) -> "Breakeven":
        """Bandwidth above which loading beats recomputing; arguments as `kvlab.sizing.planning.breakeven`."""
        from kvlab.sizing.planning import breakeven

        return breakeven(self, prefill_tokens_per_s, **how)

    def cost(self, tokens: int | str, **prices: Any) -> "Cost":
        """Keeping a sequence against recomputing it, in money; arguments as `kvlab.sizing.planning.cost`."""
        from kvlab.sizing.planning import cost

        return cost(self, _tokens(tokens), **prices)

    def explain(self) -> str:
        """The formula with this model's numbers in it, the source of the numbers, and every assumption made."""
        from kvlab.sizing.report import explain

        return explain(self)

    def to_frame(self) -> "pd.DataFrame":
        """`per_layer()` as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.per_layer()).set_index("layer")

    def to_dict(self, tokens: int | str = 4096) -> dict[str, Any]:
        """The answer as plain JSON values, evaluated at `tokens`."""
        from kvlab.sizing.report import as_dict

        return as_dict(self, _tokens(tokens))

    def _repr_html_(self) -> str:
        from kvlab.sizing.report import html

        return html(self)

    def __repr__(self) -> str:
        windows = "".join(f", {size:,} B/token within {window:,}" for window, size in self.windows.items())
        fixed = f", {self.fixed_bytes:,} B fixed" if self.fixed_bytes else ""
        curve = f"{self.growing_bytes:,} B/token{windows}{fixed}"
        return f"KVSize({self.name}, {self.dtype}, tp={self.tp}, pp={self.pp}: {curve})"

    @property
    def has_state(self) -> bool:
        """Whether some layer keeps a recurrent state."""
        return any(isinstance(part, StateKV) for layer in self.layers for part in layer.parts)


def _tokens(tokens: int | str) -> int:
    """`tokens` as an int; a negative or odd value is a ConfigError."""
    return parse_tokens(tokens)


def _largest(fits: Callable[[int], bool]) -> int:
    """Largest n with fits(n), for a monotone `fits`; 0 where not even 1 fits."""
    low, high = 0, 1
    while high < _FAR and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
