"""What came of each trap, as a table, JSON, and a page of HTML that needs nothing else."""

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

HELD, FAILED, REFUSED, CRASHED, HUNG = "held", "failed", "refused", "crashed", "hung"
NO_HITS = "no hits"  # all answers are right, and the connector loaded nothing where it could
NOT_RUN = "not run"
BAD = (FAILED, CRASHED, HUNG)
MEANING = {
    HELD: "every answer is what the engine gives without a connector",
    NO_HITS: "the same, but nothing was loaded, so that it proves nothing",
    FAILED: "an answer differs, or what must not be loaded is",
    REFUSED: "the engine does not start with the connector and these settings",
    CRASHED: "the engine ends in the middle of requests",
    HUNG: "requests wait for ever",
    NOT_RUN: "what the trap needs is not given",
}


@dataclass(frozen=True)
class Verdict:
    """What came of one trap. `exact`: answers whose logprobs could be compared to the bit, of `exact_of`."""

    trap: str
    about: str
    verdict: str
    why: str = ""
    requests: int = 0
    loaded_tokens: int = 0
    differences: int = 0
    first: Mapping[str, Any] | None = None
    exact: int = 0
    exact_of: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """Verdicts about one connector."""

    connector: str
    extra: str
    verdicts: Sequence[Verdict]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        """Whether a trap failed, crashed or hung, or no engine started with the connector."""
        began = any(one.verdict not in (REFUSED, NOT_RUN) for one in self.verdicts)
        return not began or any(one.verdict in BAD for one in self.verdicts)

    @property
    def counts(self) -> dict[str, int]:
        """Verdicts by their kind, in the order of `MEANING`."""
        found = Counter(one.verdict for one in self.verdicts)
        return {kind: found[kind] for kind in MEANING if found[kind]}

    def rows(self) -> list[list[str]]:
        """Cells of a table, the first of headings."""
        head = ["trap", "verdict", "requests", "loaded tokens", "why"]
        return [head, *([v.trap, v.verdict, str(v.requests), f"{v.loaded_tokens:,}", v.why] for v in self.verdicts)]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {**asdict(self), "verdicts": [asdict(one) for one in self.verdicts], "counts": self.counts}

    def to_html(self) -> str:
        """A page that needs no other file."""
        said = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        head = "".join(f"<th>{name}" for name in ("trap", "verdict", "requests", "loaded tokens", "what"))
        rows = "".join(_row(one) for one in self.verdicts)
        about = "".join(f"<dt>{_text(key)}<dd>{_text(value)}" for key, value in self.about.items())
        meaning = "".join(f"<dt class={_class(kind)}>{kind}<dd>{text}" for kind, text in MEANING.items())
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(self.connector)}</title><style>{STYLE}"
            f"</style><h1>{_text(self.connector)}</h1><p>{said}<p><code>{_text(self.extra)}</code>"
            f"<table><tr>{head}{rows}</table><dl>{about}</dl><h2>Verdicts</h2><dl>{meaning}</dl></html>\n"
        )


STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:"
    "collapse;width:100%}td,th{border-bottom:1px solid #8884;padding:.35em .6em;text-align:left;vertical-align:top}"
    "dt{font-weight:600}dd{margin:0 0 .4em 1.5em}small{opacity:.75;display:block}:root{color-scheme:light dark}"
    ".held{color:#2a9d4a}.failed,.crashed,.hung{color:#d33;font-weight:600}.refused,.no-hits,.not-run{color:#a70}"
)


def _row(one: Verdict) -> str:
    why = f"{_text(one.why)}<small>{_text(one.about)}</small>"
    cells = (one.trap, f"<span class={_class(one.verdict)}>{one.verdict}</span>", one.requests, one.loaded_tokens, why)
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells)


def _text(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value))


def _class(kind: str) -> str:
    return kind.replace(" ", "-")
