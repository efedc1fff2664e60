"""Why was this prompt not in the cache, and what would have kept it? The miss page of one request, by replay.

Every statement is a simulation of the traffic up to the request: what another capacity or policy would have kept is
tried and not estimated. An object that has left is not stored again before a request asks for it, so the request that
drove it out is found by bisection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError
from kvlab.simulation.cost import Prefill
from kvlab.simulation.simulate import BOUND, Policy, Simulation, Trace, as_traffic, simulate
from kvlab.simulation.tiers import Tier, as_tier
from kvlab.simulation.traffic import Request, Traffic, traffic_of_prompts
from kvlab.stores.eviction import policy_name
from kvlab.units import format_bytes

TRIED = ("lru", "fifo", "lfu", "s3fifo", "arc")
TRIES = 7  # bisections of the capacity that keeps a prompt: within a hundredth of a doubling


@dataclass(frozen=True)
class Difference:
    """Where the prompt leaves all others: the request nearest to it, the block, and the token where tokens are known.

    `block` is the first that no earlier request holds; -1 for `nearest` where none shares a block.
    """

    nearest: int
    block: int
    token: int | None = None
    ours: int | None = None
    theirs: int | None = None


@dataclass(frozen=True)
class Eviction:
    """Who drove a block out: it was last used by request `used_by`, and left while request `left_at` was stored.

    `stored` is what came in from then on, the leaving included, in the unit of the capacity.
    """

    block: int
    used_by: int
    left_at: int
    stored: int


@dataclass(frozen=True)
class MissPage:
    """One request's hit and miss, in tokens. `hit_tokens` were found, `seen_tokens` some earlier request has held.

    `policies`: tokens that each eviction policy would have found, with the hit rate of all traffic so far beside it.
    `keeps`: the smallest capacity found, as a multiple of the one there is, that keeps all that was seen; None where
    nothing had left, or no larger one keeps it.
    """

    request: int
    tokens: int
    hit_tokens: int
    seen_tokens: int
    difference: Difference | None
    eviction: Eviction | None
    policies: tuple[dict[str, Any], ...]
    keeps: float | None
    tiers: str
    unit: str
    ms: dict[str, float]

    @property
    def reason(self) -> str:
        """``hit``, ``evicted``, ``differs``, or ``first``: no earlier prompt begins like it."""
        if self.eviction is not None:
            return "evicted"
        if self.difference is None:
            return "hit"
        return "differs" if self.difference.nearest >= 0 else "first"

    def lines(self) -> list[str]:
        """The page in words."""
        told = [f"{self.hit_tokens:,} of {self.tokens:,} tokens were found in {self.tiers}."]
        if (gone := self.eviction) is not None:
            told.append(
                f"{self.seen_tokens - self.hit_tokens:,} tokens had been there: block {gone.block:,} was last used by "
                f"request {gone.used_by:,} and left while request {gone.left_at:,} was stored, after "
                f"{self._amount(gone.stored)} had come in."
            )
            told.append(
                "No larger capacity keeps them under this policy."
                if self.keeps is None
                else f"{self.keeps:.2f} times the capacity keeps all of them."
            )
        if (differs := self.difference) is not None:
            if differs.nearest < 0:
                told.append("No earlier prompt begins like this one.")
            elif differs.token is None:
                told.append(f"From block {differs.block:,} on it is new; request {differs.nearest:,} is nearest.")
            elif differs.theirs is None:
                told.append(f"It goes on where request {differs.nearest:,} ends, at token {differs.token:,}.")
            else:
                told.append(
                    f"Token {differs.token:,} is {differs.ours}, and {differs.theirs} in request {differs.nearest:,}, "
                    "the nearest."
                )
        if self.ms:
            told.append(f"Computing took {self.ms['computed']:.1f} ms; with all that was seen, {self.ms['least']:.1f}.")
        return told

    def __repr__(self) -> str:
        rows = [f"  {row['policy']:>8}  {row['hit_tokens']:,} tokens" for row in self.policies]
        return "\n".join([f"request {self.request:,}: {self.reason}", *self.lines(), *rows])

    def _repr_html_(self) -> str:
        paragraphs = "".join(f"<p>{escape(line)}</p>" for line in self.lines())
        rows = "".join(
            f"<tr><td>{escape(row['policy'])}</td><td>{row['hit_tokens']:,}</td><td>{row['token_hit_rate']:.1%}</td></tr>"
            for row in self.policies
        )
        head = "<tr><th>policy</th><th>tokens found</th><th>token hit rate up to here</th></tr>"
        bars = "".join(
            f"<div style='background:{color};width:{100 * part / self.tokens:.1f}%' title='{escape(name)}'></div>"
            for name, color, part in (
                ("found", "#3b6ea8", self.hit_tokens),
                ("evicted", "#b5523b", self.seen_tokens - self.hit_tokens),
                ("new", "#b8b8b8", self.tokens - self.seen_tokens),
            )
        )
        strip = f"<div style='display:flex;height:14px;max-width:640px'>{bars}</div>"
        title = f"<b>request {self.request:,}: {escape(self.reason)}</b>"
        return f"<div>{title}{strip}{paragraphs}<table>{head}{rows}</table></div>"

    def _amount(self, size: int) -> str:
        return format_bytes(size) if self.unit == "bytes" else f"{size:,} blocks"


def why(
    trace: Trace,
    request: int = -1,
    tiers: Sequence[Tier | str | int] | Tier | str | int = "unbounded",
    *,
    policy: Policy | None = None,
    policies: Sequence[Policy] = TRIED,
    prefill: Prefill | None = None,
    block_tokens: int = 16,
    **settings: Any,
) -> MissPage:
    """The miss page of one request of `trace`.

    Parameters
    ----------
    trace, tiers, policy, settings
        as `simulate` takes them; of a list of token prompts, the page names tokens
    request
        its place in the trace, from 0 on; negative from the end
    policies
        that are tried in the place of the one there is
    prefill
        adds milliseconds
    block_tokens
        of a block, where the trace is a list of token prompts

    Raises
    ------
    ConfigError
        naming the argument

    Examples
    --------
    >>> system = list(range(64))
    >>> why([system + [1] * 64, system + [2] * 64], chunk_tokens=16).lines()[1]
    'Token 64 is 2, and 1 in request 0, the nearest.'
    """
    prompts = None if isinstance(trace, Traffic | str | Path) else trace
    traffic = as_traffic(trace) if prompts is None else traffic_of_prompts(prompts, block_tokens=block_tokens)
    count = len(traffic.requests)
    if not isinstance(request, int) or not -count <= request < count:
        raise ConfigError(f"request must be a place in a trace of {count:,}, got {request!r}")
    at = request % count
    traffic = traffic.head(at + 1)
    asked = traffic.requests[at]
    if not asked.block_ids:
        raise ConfigError(f"request {at} has no full block of {traffic.block_tokens} tokens, so nothing is kept of it")
    if policy == BOUND:
        raise ConfigError("why needs the policy of a store; belady knows the future and tells no reason")
    stack = [as_tier(tier) for tier in ([tiers] if isinstance(tiers, Tier | str | int) else tiers)]
    given: Any = tiers
    run = simulate(traffic, given, policy=policy, **settings)
    whole = simulate(traffic, "unbounded", **settings)
    hit, seen = int(run.hit_blocks[-1]), int(whole.hit_blocks[-1])
    eviction, keeps, rows = None, None, []
    if seen > hit:
        eviction = _eviction(traffic, hit, given, policy, settings)
        keeps = _keeps(traffic, stack, seen, policy, settings)
        for one in policies:
            tried = simulate(traffic, stack, policy=one, **settings)
            rate = {"hit_tokens": int(tried.hit_tokens[-1]), "token_hit_rate": tried.row["token_hit_rate"]}
            rows.append({"policy": policy_name(one), **rate})
    ms = {} if prefill is None else _ms(prefill, run, whole)
    return MissPage(
        at, asked.num_tokens, int(run.hit_tokens[-1]), int(whole.hit_tokens[-1]), _difference(traffic, prompts),
        eviction, tuple(rows), keeps, str(run.row["tiers"]), str(run.row["unit"]), ms,
    )  # fmt: skip


def _difference(traffic: Traffic, prompts: Sequence[Sequence[int]] | None) -> Difference | None:
    """Where the last request leaves all that came before; None where one of them holds all its blocks."""
    *earlier, asked = traffic.requests
    places = {block: place for place, block in enumerate(asked.block_ids)}
    nearest, shared = -1, 0
    for number, other in enumerate(earlier):
        length = 0
        for mine, theirs in zip(asked.block_ids, other.block_ids, strict=False):
            if mine != theirs:
                break
            length += 1
        if length and length >= shared:
            nearest, shared = number, length
    if shared == len(places):
        return None
    if prompts is None:
        return Difference(nearest, shared)
    ours, best, length = prompts[len(earlier)], nearest, shared * traffic.block_tokens
    for number in range(len(earlier)):  # the block that differs may begin with tokens that are shared
        same = _shared_tokens(ours, prompts[number])
        if same > length or best < 0 < same:
            best, length = number, same
    if best < 0:
        return Difference(-1, shared)
    tokens = [prompt[length] if length < len(prompt) else None for prompt in (ours, prompts[best])]
    return Difference(best, shared, length, *tokens)


def _shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _eviction(traffic: Traffic, hit: int, tiers: Any, policy: Policy | None, settings: dict[str, Any]) -> Eviction:
    """Who drove out the first block that was seen and is not found."""
    *earlier, asked = traffic.requests
    block = asked.block_ids[hit]
    used = max(number for number, other in enumerate(earlier) if block in other.block_ids)

    def state(number: int) -> tuple[bool, int]:
        """Whether it is found once request `number` is stored, and what was stored until then."""
        part = Traffic(traffic.name, traffic.block_tokens, [*earlier[: number + 1], _asks(asked, earlier[number])])
        run = simulate(part, tiers, policy=policy, **settings)
        before = simulate(
            Traffic(traffic.name, traffic.block_tokens, earlier[: number + 1]), tiers, policy=policy, **settings
        )
        return int(run.hit_blocks[-1]) > hit, int(before.row["stored"])

    low, high = used, len(earlier) - 1  # the request before the one asked for leaves it missing
    found, first = state(low)
    if not found:
        return Eviction(hit, used, used, 0)
    while high - low > 1:
        middle = (low + high) // 2
        if state(middle)[0]:
            low = middle
        else:
            high = middle
    return Eviction(hit, used, high, state(high)[1] - first)


def _asks(asked: Request, after: Request) -> Request:
    return Request(after.arrival_s, asked.num_tokens, asked.output_tokens, asked.block_ids)


def _keeps(
    traffic: Traffic, stack: Sequence[Tier], seen: int, policy: Policy | None, settings: dict[str, Any]
) -> float | None:
    """The multiple of the lowest tier's capacity that keeps what was seen."""
    lowest = stack[-1]
    if lowest.capacity is None:
        return None

    def kept(factor: float) -> bool:
        size = int((lowest.capacity or 0) * factor)
        larger = Tier(size, lowest.name, lowest.in_blocks, lowest.gb_per_s, lowest.latency_ms)
        return int(simulate(traffic, [*stack[:-1], larger], policy=policy, **settings).hit_blocks[-1]) >= seen

    factor = 2.0
    while not kept(factor):
        factor *= 2
        if factor > 1 << 20:
            return None
    low, high = factor / 2, factor
    for _ in range(TRIES):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def _ms(prefill: Prefill, run: Simulation, whole: Simulation) -> dict[str, float]:
    """Milliseconds of computing what was not found, and what no earlier request has held."""
    tokens = run.traffic.num_tokens[-1:]
    seconds = {"computed": run.hit_tokens[-1:], "least": whole.hit_tokens[-1:]}
    return {
        name: float(prefill.seconds(tokens, found.clip(max=tokens - 1))[0]) * 1e3 for name, found in seconds.items()
    }
