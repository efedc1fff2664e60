"""Traffic: which prompts came when, and which blocks they are made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvlab.errors import ConfigError
from kvlab.hashing import Extra, block_hashes


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. `block_ids[i]` names the prefix that ends with block i: equal ids mean equal tokens up to there.

    The last block may hold fewer than `block_tokens` tokens (as in published traces), or the prompt may go on for
    less than a block beyond it (as kvlab cuts prompts). `loads`, `saves`: whether a cache may serve it, and keep it.
    """

    arrival_s: float
    num_tokens: int
    output_tokens: int
    block_ids: list[int]
    loads: bool = True
    saves: bool = True


@dataclass(frozen=True, eq=False)
class Traffic:
    """Requests in the order of arrival; `block_tokens` tokens make a block."""

    name: str
    block_tokens: int
    requests: list[Request]

    def __repr__(self) -> str:
        return f"Traffic({self.name!r}, {len(self.requests):,} requests, blocks of {self.block_tokens} tokens)"

    @cached_property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each prompt, shape [requests]."""
        return np.array([request.num_tokens for request in self.requests], np.int64)

    @cached_property
    def num_blocks(self) -> npt.NDArray[np.int64]:
        """Blocks of each prompt, shape [requests]."""
        return np.array([len(request.block_ids) for request in self.requests], np.int64)

    @cached_property
    def arrivals_s(self) -> npt.NDArray[np.float64]:
        """Shape [requests], ascending."""
        return np.array([request.arrival_s for request in self.requests], np.float64)

    @cached_property
    def num_unique_blocks(self) -> int:
        return len({block for request in self.requests for block in request.block_ids})

    @property
    def duration_s(self) -> float:
        """From the first to the last arrival."""
        return float(self.arrivals_s[-1] - self.arrivals_s[0])

    def head(self, num_requests: int) -> "Traffic":
        """The first `num_requests` requests."""
        return Traffic(self.name, self.block_tokens, self.requests[:num_requests])

    def summary(self) -> dict[str, int | float | str]:
        """One row for pandas; `reuse` is the share of block accesses that an unbounded cache would answer."""
        accesses = int(self.num_blocks.sum())
        return {
            "traffic": self.name,
            "requests": len(self.requests),
            "block_tokens": self.block_tokens,
            "accesses": accesses,
            "unique_blocks": self.num_unique_blocks,
            "reuse": 1 - self.num_unique_blocks / accesses,
            "mean_prompt_tokens": float(self.num_tokens.mean()),
            "hours": self.duration_s / 3600,
        }


class Chain:
    """Gives every prefix a number: same parent and same content, same number."""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, object], int] = {}

    def number(self, contents: Iterable[object]) -> list[int]:
        """One number per block of a prompt whose blocks have `contents`."""
        ids, parent = self._ids, -1
        numbers = []
        for content in contents:
            parent = ids.setdefault((parent, content), len(ids))
            numbers.append(parent)
        return numbers


def traffic_of_prompts(
    prompts: Iterable[Sequence[int]],
    *,
    block_tokens: int = 16,
    seconds_between: float = 0.0,
    name: str = "prompts",
    extras: Sequence[Mapping[int, Sequence[Extra]]] | None = None,
) -> Traffic:
    """Token prompts as traffic, named by the same hash chain as stored objects are; full blocks only. `extras` of each
    prompt change the names of its blocks, as `block_hashes` takes them."""
    if type(block_tokens) is not int or block_tokens < 1:
        raise ConfigError(f"block_tokens must be a whole number above 0, got {block_tokens!r}"[:200])
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise ConfigError(f"a trace must be a Traffic, a path or prompts of tokens, got {type(prompts).__name__}")
    names: dict[bytes, int] = {}
    requests = []
    for index, prompt in enumerate(prompts):
        hashes = block_hashes(prompt, block_tokens, extras=extras[index] if extras else None)
        ids = [names.setdefault(block, len(names)) for block in hashes]
        requests.append(Request(index * seconds_between, len(prompt), 0, ids))
    return checked(Traffic(name, block_tokens, requests))


def prompts_of_traffic(traffic: Traffic, *, vocabulary: int = 32_000) -> list[list[int]]:
    """Token prompts that share prefixes exactly where the traffic's block ids do (tokens are made up).

    Hashing them again gives traffic of the same shape; what goes beyond the last full block is the prompt's own.
    """
    prompts = []
    for index, request in enumerate(traffic.requests):
        tokens: list[int] = []
        for block in request.block_ids:
            tokens += _tokens(block, traffic.block_tokens, vocabulary)
        del tokens[request.num_tokens :]
        rest = request.num_tokens - len(tokens)
        prompts.append(tokens + _tokens(-1 - index, rest, vocabulary))
    return prompts


def checked(traffic: Traffic) -> Traffic:
    """`traffic`, unless there is nothing in it to reuse."""
    if not any(request.block_ids for request in traffic.requests):
        raise ConfigError(f"{traffic.name} holds no prompt with a full block of {traffic.block_tokens} tokens")
    return traffic


def _tokens(seed: int, count: int, vocabulary: int) -> list[int]:
    """Tokens that differ between seeds: the seed itself leads, in base `vocabulary`."""
    state, tokens = seed & 0xFFFFFFFF, [seed % vocabulary, seed // vocabulary % vocabulary]
    while len(tokens) < count:
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF  # Numerical Recipes' generator: any machine, any year
        tokens.append((state >> 8) % vocabulary)
    return tokens[:count]
