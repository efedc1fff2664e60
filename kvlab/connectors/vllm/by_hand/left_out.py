"""What of an engine the replay of its requests does not know, and when a page must say so."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvlab.hashing import Extra
from kvlab.simulation.replay_connector import ConnectorRules


class Ended(NamedTuple):
    """A request that is done. `not_loaded` and `not_saved` say why nothing could be found for it, or was kept of it;
    `resets`: of the cache, before it ended. `miss` is the engine's own reason, `loaded_tokens` what it loaded, None
    where that is not known."""

    arrival_s: float
    token_ids: tuple[int, ...]
    output_tokens: int
    extras: Mapping[int, Sequence[Extra]] = {}
    not_loaded: str = ""
    not_saved: str = ""
    resets: int = 0
    miss: str = ""
    loaded_tokens: int | None = None
    pins: bool = False
    ended_s: float = 0.0


class Seen(NamedTuple):
    """A replay: of these requests, which ended one after the other, as what `connector` kept. `is_whole`: nothing was
    kept before the first of them, and `is_cut`: prompts before it are forgotten."""

    part: Sequence[Ended]
    connector: Any
    prefix_cache: bool
    is_whole: bool
    is_cut: bool


def _fills_in_part(seen: Seen) -> bool:
    block = seen.connector.chunker.block_tokens
    kept = seen.connector.scheduler.keeps_partial_block
    return kept and any(len(each.token_ids) % block > 1 for each in seen.part)


def _has_salts(seen: Seen) -> bool:
    tags = {tag for each in seen.part for pairs in each.extras.values() for tag, _ in pairs}
    return seen.connector.config.max_salt_share < 1 and "cache_salt" in tags


LEFT_OUT: dict[str, Callable[[Seen], bool]] = {  # in words, as in docs/guide/edit.md -> whether it is in use
    "what was kept before the cache was attached": lambda seen: not seen.is_whole,
    "prompts before the latest 10,000": lambda seen: seen.is_cut,
    "last blocks that prompts fill in part": _fills_in_part,
    "generated tokens (save_generated)": lambda seen: seen.connector.config.save_generated,
    "secondary tiers": lambda seen: seen.connector.scheduler.tiers is not None,
    "vLLM's prefix cache": lambda seen: seen.prefix_cache,
    "pins": lambda seen: any(each.pins for each in seen.part[:-1]),
    "max_salt_share": _has_salts,
    "what is not saved by store_threshold and store_rule": lambda seen: bool(
        seen.connector.config.store_threshold > 1 or seen.connector.config.store_rule
    ),
    "loads that admission did not make": lambda seen: any(each.miss.startswith("not_worth") for each in seen.part),
    "hits that quality_check computed": lambda seen: any(each.miss == "quality_check" for each in seen.part),
    "layers with a sliding window": lambda seen: seen.connector.groups.have_windows,
    "recurrent states": lambda seen: bool(seen.connector.groups.recurrent),
    "prompts under way at the same time": lambda seen: any(
        later.arrival_s < sooner.ended_s for sooner, later in zip(seen.part, seen.part[1:], strict=False)
    ),
}


def left_out(seen: Seen) -> list[str]:
    """What is in use and not in the replay, in words."""
    return [words for words, is_in_use in LEFT_OUT.items() if is_in_use(seen)]


def rules_of(connector: Any) -> ConnectorRules:
    """What the replay knows of an engine's settings beside sizes and the policy."""
    return ConnectorRules(connector.scheduler.keeps_partial_block, connector.config.min_hit_tokens)
