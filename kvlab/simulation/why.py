"""Why was this prompt not in the cache, and what would have kept it? The miss page of one request, by replay.

Every statement is a simulation of the traffic up to the request: what another capacity or policy would have kept is
tried and not estimated. An object that has left is not stored again before a request that is made of it, so the request
that drove it out is found by bisection over what the tiers hold.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError
from kvlab.simulation.cost import Prefill
from kvlab.simulation.foreign import check_asked
from kvlab.simulation.replay import cut, find
from kvlab.simulation.replay_connector import ConnectorRules
from kvlab.simulation.simulate import BOUND, Policy, Simulation, Trace, as_traffic, default_chunk, simulate
from kvlab.simulation.tiers import Tier, as_tier
from kvlab.simulation.traffic import Traffic, traffic_of_prompts
from kvlab.stores.eviction import policy_name
from kvlab.units import format_bytes

TRIED = ("lru", "fifo", "lfu", "s3fifo", "arc")
TRIES = 7  # bisections of the capacity that keeps a prompt: within a hundredth of a doubling


@dataclass(frozen=True)
class Difference:
    """Where the prompt leaves all others: the request nearest to it, the block, and the token where tokens are known.

    `block` is the first that no earlier request holds; -1 for `nearest` where none shares a block. `is_within`: the
    nearest holds all of its blocks, the last ones in a chunk that ends behind the prompt.
    """

    nearest: int
    block: int
    token: int | None = None
    ours: int | None = None
    theirs: int | None = None
    is_within: bool = False


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
    nothing had left, or no larger one keeps it. `refused_tokens`: what admission did not store of an earlier prompt;
    `too_short_tokens`: what was held and is less than the connector's `min_hit_tokens`.
    `cause` and `notes` are what the replay does not know, of an engine that does (`AttachedCache.why`).
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
    refused_tokens: int = 0
    too_short_tokens: int = 0
    cause: str = ""
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Of the first block that is missing: ``evicted``, ``not_stored`` (by admission), ``differs``, ``within_chunk``
        (an earlier prompt has it in a chunk that ends behind this prompt), or ``first``: no earlier prompt begins like
        it; the `cause`; ``too_short`` (for `min_hit_tokens`); or ``hit``."""
        if self.cause:
            return self.cause
        if self.too_short_tokens:
            return "too_short"
        if self.eviction is not None:
            return "evicted"
        if self.refused_tokens:
            return "not_stored"
        if self.difference is None:
            return "hit"
        if self.difference.is_within:
            return "within_chunk"
        return "differs" if self.difference.nearest >= 0 else "first"

    def lines(self) -> list[str]:
        """The page in words."""
        told = [f"{self.hit_tokens:,} of {self.tokens:,} tokens were found in {self.tiers}."]
        if self.too_short_tokens:
            told.append(f"{self.too_short_tokens:,} tokens were held, too few to be loaded: min_hit_tokens.")
        held = max(self.hit_tokens, self.too_short_tokens)
        if (gone := self.eviction) is not None:
            told.append(
                f"{self.seen_tokens - held:,} tokens had been there: block {gone.block:,} was last used by "
                f"request {gone.used_by:,} and left while request {gone.left_at:,} was stored, after "
                f"{self._amount(gone.stored)} had come in."
            )
            told.append(
                "No larger capacity keeps them under this policy."
                if self.keeps is None
                else f"{self.keeps:.2f} times the capacity keeps all of them."
            )
        if self.refused_tokens:
            told.append(
                f"{self.refused_tokens:,} tokens more an earlier prompt has had, and admission did not store them."
            )
        if (differs := self.difference) is not None:
            if differs.nearest < 0:
                told.append(f"No earlier prompt{' that could serve it' if self.cause else ''} begins like this one.")
            elif differs.is_within:
                told.append(f"Request {differs.nearest:,} has all of it, in a chunk that ends behind this prompt.")
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
        return [*told, *self.notes]

    def behind(self, count: int) -> "MissPage":
        """The same where `count` requests stand before those of the replay."""
        differs, gone = self.difference, self.eviction
        if differs is not None and differs.nearest >= 0:
            differs = replace(differs, nearest=differs.nearest + count)
        if gone is not None:
            gone = replace(gone, used_by=gone.used_by + count, left_at=gone.left_at + count)
        return replace(self, request=self.request + count, difference=differs, eviction=gone)

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
    if isinstance(trace, Traffic | str | Path):
        return why_of(
            as_traffic(trace), None, request, tiers, policy=policy, policies=policies, prefill=prefill, **settings
        )
    traffic = traffic_of_prompts(trace, block_tokens=block_tokens)
    return why_of(traffic, trace, request, tiers, policy=policy, policies=policies, prefill=prefill, **settings)


def why_of(
    traffic: Traffic,
    prompts: Sequence[Sequence[int]] | None,
    request: int,
    tiers: Sequence[Tier | str | int] | Tier | str | int,
    *,
    policy: Policy | None = None,
    policies: Sequence[Policy] = TRIED,
    prefill: Prefill | None = None,
    **settings: Any,
) -> MissPage:
    """`why` of traffic whose tokens are known besides. A prompt whose place in `prompts` is empty is compared by its
    blocks alone."""
    count = len(traffic.requests)
    if not isinstance(request, int) or not -count <= request < count:
        raise ConfigError(f"request must be a place in a trace of {count:,}, got {request!r}")
    at = request % count
    traffic = traffic.head(at + 1)
    asked = traffic.requests[at]
    if not asked.block_ids:
        raise ConfigError(f"request {at} has no full block of {traffic.block_tokens} tokens, so nothing is kept of it")
    check_asked(policies, prefill)
    if policy == BOUND:
        raise ConfigError("why needs the policy of a store; belady knows the future and tells no reason")
    stack = [as_tier(tier) for tier in ([tiers] if isinstance(tiers, Tier | str | int) else tiers)]
    given: Any = tiers
    run = simulate(traffic, given, policy=policy, **settings)
    whole = simulate(traffic, "unbounded", **settings)
    admitted = simulate(traffic, "unbounded", **{**settings, "admission": None}) if settings.get("admission") else whole
    hit, seen = int(run.hit_blocks[-1]), int(whole.hit_blocks[-1])
    connector = settings.get("connector")
    rules = connector if isinstance(connector, ConnectorRules) else ConnectorRules()
    most = rules.most_blocks(asked.num_tokens, len(asked.block_ids), traffic.block_tokens)
    notes: list[str] = []
    if not asked.loads:
        notes.append("A cache may not serve it.")
    elif most < len(asked.block_ids):
        notes.append(f"{most * traffic.block_tokens:,} tokens can be served: whole blocks before its last token.")
    held = 0 if hit else _held(traffic, rules, given, policy, settings)
    eviction, keeps, rows = None, None, []
    if seen > max(hit, held):
        eviction = _eviction(traffic, max(hit, held), given, policy, settings)
        keeps = _keeps(traffic, stack, seen, policy, settings)
        for one in policies:
            tried = simulate(traffic, stack, policy=one, **settings)
            rate = {"hit_tokens": int(tried.hit_tokens[-1]), "token_hit_rate": tried.row["token_hit_rate"]}
            rows.append({"policy": policy_name(one), **rate})
    ms = {} if prefill is None else _ms(prefill, run, whole)
    cause = "" if asked.loads else "not_loaded"
    difference = None if hit >= most or cause else _difference(traffic, prompts)
    if difference is not None and difference.is_within and (eviction or held):
        difference = None
    return MissPage(
        at, asked.num_tokens, int(run.hit_tokens[-1]), int(whole.hit_tokens[-1]), difference, eviction, tuple(rows),
        keeps, str(run.row["tiers"]), str(run.row["unit"]), ms, int(admitted.hit_tokens[-1] - whole.hit_tokens[-1]),
        held * traffic.block_tokens, cause, tuple(notes),
    )  # fmt: skip


def _held(traffic: Traffic, rules: ConnectorRules, tiers: Any, policy: Policy | None, settings: dict[str, Any]) -> int:
    """Blocks that the last request could have been served, and was not, as they are fewer than `min_hit_tokens`."""
    last, asked = len(traffic.requests) - 1, traffic.requests[-1]
    if rules.min_hit_tokens == 1 or not last or not asked.loads:
        return 0
    objects = cut(traffic, settings.get("chunk_tokens") or default_chunk(traffic))
    held = {key for tier in simulate(traffic.head(last), tiers, policy=policy, **settings).held for key in tier}
    found = find(objects.block_ids[last], objects.keys[last], objects.step, dict.fromkeys(held, 1))[1]
    found = min(found, rules.most_blocks(asked.num_tokens, len(asked.block_ids), traffic.block_tokens))
    return found if rules.is_too_short(found, asked.num_tokens, traffic.block_tokens) else 0


def _difference(traffic: Traffic, prompts: Sequence[Sequence[int]] | None) -> Difference:
    """Where the last request leaves all that came before."""
    *earlier, asked = traffic.requests
    places = {block: place for place, block in enumerate(asked.block_ids)}
    nearest, shared = -1, 0
    for number, other in enumerate(earlier):
        if not other.saves:
            continue
        length = _num_shared(asked.block_ids, other.block_ids)
        if length and length >= shared:
            nearest, shared = number, length
    if shared == len(places):
        return Difference(nearest, shared, is_within=True)
    if prompts is None:
        return Difference(nearest, shared)
    ours, best, length = prompts[len(earlier)], nearest, shared * traffic.block_tokens
    for number in (
        number for number, other in enumerate(earlier) if other.saves
    ):  # the block that differs may begin with tokens that are shared
        same = _num_shared(ours, prompts[number])
        if same > length or best < 0 < same:
            best, length = number, same
    if best < 0:
        return Difference(-1, shared)
    our_token, their_token = (prompt[length] if length < len(prompt) else None for prompt in (ours, prompts[best]))
    return Difference(best, shared, length, our_token, their_token)


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _eviction(traffic: Traffic, hit: int, tiers: Any, policy: Policy | None, settings: dict[str, Any]) -> Eviction:
    """Who drove out the first object that was seen and is not found."""
    step_tokens = settings.get("chunk_tokens") or default_chunk(traffic)
    objects, last = cut(traffic, step_tokens), len(traffic.requests) - 1

    def found(number: int, held: Collection[int]) -> list[int]:
        """The objects that request `number` finds."""
        return find(objects.block_ids[number], objects.keys[number], objects.step, dict.fromkeys(held, 1))[0]

    def after(number: int) -> tuple[set[int], int]:
        """What is held once request `number` is stored, and what was stored until then."""
        run = simulate(traffic.head(number + 1), tiers, policy=policy, **settings)
        return {key for tier in run.held for key in tier}, int(run.row["stored"])

    (everything,) = simulate(traffic.head(last), "unbounded", **settings).held
    lost = found(last, everything)[hit // objects.step]
    made = [number for number in range(last) if lost in objects.keys[number] and traffic.requests[number].saves]
    used = made[-1]
    for number in range(last - 1, used, -1):  # prompts that it is a part of may have found it later
        if lost in objects.block_ids[number] and lost in found(number, after(number - 1)[0]):
            used = number
            break
    held, first = after(used)
    if lost not in held:
        return Eviction(hit, used, used, 0)
    low, high = used, last - 1  # the request before the one asked for leaves it missing
    while high - low > 1:
        middle = (low + high) // 2
        if lost in after(middle)[0]:
            low = middle
        else:
            high = middle
    return Eviction(hit, used, high, after(high)[1] - first)


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
