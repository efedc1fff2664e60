"""What is asked, what is answered, and where two answers differ."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TOLERANCE = 5e-3  # of a logprob: another step shape moves one by 1e-5, a wrong page by more than this


@dataclass(frozen=True)
class Ask:
    """One request. `patience`: steps until it is aborted; 0 is never."""

    tokens: tuple[int, ...]
    salt: str = ""
    adapter: int = 0
    max_tokens: int = 8
    n: int = 1
    prompt_logprobs: bool = False
    priority: int = 0
    patience: int = 0

    @property
    def key(self) -> str:
        """Names the answer, which neither salt nor priority changes."""
        return hashlib.sha256(repr((self.tokens, self.adapter)).encode()).hexdigest()[:24]

    @property
    def shown(self) -> str:
        more = {"salt": self.salt, "adapter": self.adapter, "priority": self.priority}
        return ", ".join([f"{len(self.tokens)} tokens", *(f"{name} {value}" for name, value in more.items() if value)])


@dataclass(frozen=True)
class Answer:
    """Tokens, the logprob of each, and by how much it was ahead of the second. `cached`: tokens that were not computed;
    `loaded`: those of them that the connector gave."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    margins: Sequence[float]
    prompt_logprobs: Sequence[float] = ()
    cached: int = 0
    loaded: int = 0


@dataclass(frozen=True)
class Difference:
    """Where an answer is not what it must be: `at` is the token's place in the answer, -1 where it is none."""

    request: str
    what: str
    at: int = -1
    expected: Any = None
    got: Any = None
    loaded: int = 0

    @property
    def shown(self) -> str:
        hit = f", {self.loaded} tokens loaded" if self.loaded else ""
        if self.at < 0:
            return f"{self.what} ({self.request}{hit})"
        return f"{self.what} {self.at}: {self.got} in the place of {self.expected} ({self.request}{hit})"


@dataclass
class Book:
    """Answers of an engine without a connector, by `Ask.key`; `exact` has logprobs by cached tokens too."""

    answers: dict[str, Answer] = field(default_factory=dict)
    exact: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        kept = {"answers": {key: asdict(one) for key, one in self.answers.items()}, "exact": self.exact}
        path.write_text(json.dumps(kept))

    @classmethod
    def read(cls, path: Path) -> "Book":
        kept: Mapping[str, Any] = json.loads(path.read_text())
        exact = {key: {int(at): row for at, row in rows.items()} for key, rows in kept["exact"].items()}
        return cls({key: Answer(**one) for key, one in kept["answers"].items()}, exact)


def difference(ask: Ask, got: Answer, wanted: Answer) -> Difference | None:
    """The first place where `got` is not `wanted`; what follows a near tie is not compared."""
    for at in range(min(ask.max_tokens, len(wanted.tokens))):
        if at >= len(got.tokens):
            return Difference(ask.shown, "the answer ends at token", at, wanted.tokens[at], None, got.loaded)
        if got.tokens[at] != wanted.tokens[at]:
            if wanted.margins[at] < TOLERANCE:
                break
            return Difference(ask.shown, "token", at, wanted.tokens[at], got.tokens[at], got.loaded)
        if abs(got.logprobs[at] - wanted.logprobs[at]) > TOLERANCE:
            values = (round(wanted.logprobs[at], 4), round(got.logprobs[at], 4))
            return Difference(ask.shown, "logprob of token", at, *values, got.loaded)
    return _of_prompt(ask, got, wanted) if ask.prompt_logprobs else None


def _of_prompt(ask: Ask, got: Answer, wanted: Answer) -> Difference | None:
    if len(got.prompt_logprobs) != len(wanted.prompt_logprobs):
        counts = (len(wanted.prompt_logprobs), len(got.prompt_logprobs))
        return Difference(ask.shown, "prompt logprobs are missing from token", min(counts), *counts, got.loaded)
    for at, (one, other) in enumerate(zip(got.prompt_logprobs, wanted.prompt_logprobs, strict=True)):
        if abs(one - other) > TOLERANCE:
            return Difference(ask.shown, "logprob of prompt token", at + 1, round(other, 4), round(one, 4), got.loaded)
    return None
