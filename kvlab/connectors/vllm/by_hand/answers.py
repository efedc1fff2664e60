"""What an engine says behind a prompt, and how far two answers lie apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from vllm import SamplingParams

from kvlab.errors import ConfigError

Logprobs = Mapping[int, float]  # of the likeliest tokens at one place


@dataclass(frozen=True)
class Answer:
    """Tokens that follow a prompt, and at each place the logprobs of the likeliest ones."""

    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = field(repr=False)
    cached_tokens: int = 0  # of the prompt, that were not computed


@dataclass(frozen=True)
class Change:
    """What becomes of an answer when KV changes.

    `before` and `after` are what each prompt is answered. `rows` follow the tokens of `before` under both, so that each
    place compares like with like: the token's logprob under both (-inf where it is not among the likeliest), whether
    the likeliest token is the same, and the KL divergence: a lower bound of it, or itself with ``top=-1``.
    """

    before: Answer
    after: Answer
    rows: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        return (
            f"Change(same tokens: {self.same_tokens} of {len(self.rows)}, same likeliest token: {self.agreement:.0%}, "
            f"KL {self.kl:.3g} nats a token)"
        )

    def _repr_html_(self) -> str:
        if not self.rows:
            return escape(repr(self))
        names = list(self.rows[0])
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(_shown(row[name]))}</td>' for name in names)}</tr>" for row in self.rows
        )
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"

    @property
    def same_tokens(self) -> int:
        """How many tokens the two answers share from their start."""
        pairs = zip(self.before.tokens, self.after.tokens, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), len(self.before.tokens))

    @property
    def agreement(self) -> float:
        """Share of places with the same likeliest token."""
        return float(sum(row["same_likeliest"] for row in self.rows) / len(self.rows))

    @property
    def kl(self) -> float:
        """Mean over the places, in nats."""
        return float(sum(row["kl"] for row in self.rows) / len(self.rows))


class Asking:
    """Questions to an `LLM` of this process, greedy and with the `top` likeliest tokens at each place (-1: all)."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def check_alone(self) -> None:
        """ConfigError while the engine has requests: their answers, and their pages, would be taken for these."""
        if self._llm.llm_engine.has_unfinished_requests():
            raise ConfigError("the engine has requests that have not ended; finish or abort them first")

    def answers(self, prompts: Sequence[dict[str, Any]], *, max_tokens: int, top: int) -> list[Answer]:
        self.check_alone()
        limit = self._llm.llm_engine.model_config.max_logprobs
        if top != -1 and not 1 <= top <= (limit if limit >= 0 else math.inf):
            raise ConfigError(f"top must be 1 to {limit} logprobs, got {top}; start the LLM with a larger max_logprobs")
        if top == -1 and limit >= 0:
            raise ConfigError(f"top=-1 needs an LLM with max_logprobs=-1, this one has {limit}")
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=top, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate(list(prompts), sampling, use_tqdm=False)
        return [
            Answer(
                tuple(output.outputs[0].token_ids),
                tuple({token: each.logprob for token, each in place.items()} for place in output.outputs[0].logprobs),
                output.num_cached_tokens or 0,
            )
            for output in outputs
        ]

    def follow(self, prompt: Mapping[str, Any], tokens: Sequence[int], *, top: int) -> list[Logprobs]:
        """The logprobs at each place of `tokens` behind `prompt`, whatever it would answer itself."""
        prompts = [
            {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *tokens[:count]]}
            for count in range(len(tokens))
        ]
        return [answer.logprobs[0] for answer in self.answers(prompts, max_tokens=1, top=top)]

    def change(self, before: dict[str, Any], after: dict[str, Any], *, max_tokens: int, top: int) -> Change:
        first = self.answers([before], max_tokens=max_tokens, top=top)[0]
        second = self.answers([after], max_tokens=max_tokens, top=top)[0]
        places = zip(first.tokens, first.logprobs, self.follow(after, first.tokens, top=top), strict=True)
        rows = tuple(
            {
                "token": token,
                "logprob_before": ours[token],
                "logprob_after": theirs.get(token, -math.inf),
                "same_likeliest": likeliest(ours) == likeliest(theirs),
                "kl": divergence(ours, theirs),
            }
            for token, ours, theirs in places
        )
        return Change(first, second, rows)


def likeliest(logprobs: Logprobs) -> int:
    return max(logprobs, key=lambda token: logprobs[token])


def divergence(ours: Logprobs, theirs: Logprobs) -> float:
    """A lower bound of KL(ours, theirs) in nats; the divergence itself where both name all tokens.

    A token that `theirs` does not name is no likelier there than the least likely of those it names, and all tokens
    that `ours` does not name are at most what is left.
    """
    least = min(theirs.values())
    found = sum(math.exp(p) * (p - theirs.get(token, least)) for token, p in ours.items() if p > -math.inf)
    shared = ours.keys() & theirs.keys()
    rest = max(1 - sum(math.exp(p) for p in ours.values()), 0.0)
    most = max(1 - sum(math.exp(theirs[token]) for token in shared), 1e-12)
    if rest > 1e-9:
        found += rest * math.log(rest / most)
    return max(found, 0.0)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
