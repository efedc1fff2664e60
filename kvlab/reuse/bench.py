"""How good is a context's KV? What the model says behind it, beside what it says behind the KV computed as a whole."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import capture, check_model, check_tokens, to_cache
from kvlab.errors import ConfigError
from kvlab.reuse.methods import METHODS, Case, Method
from kvlab.reuse.presses import PRESSES, Score, pressed, pruned
from kvlab.simulation.cost import Prefill

Rows = list[dict[str, Any]]
MEASURED = ("computed", "kept", "kl", "same_token", "seconds")


def compare_reuse(
    model: Any,
    pieces: Sequence[Sequence[int]],
    question: Sequence[int],
    *,
    methods: Mapping[str, Method] = METHODS,
    answer_tokens: int = 8,
) -> Rows:
    """One row a method: the context's KV is made of its pieces' by the method, the question is computed behind it.

    Parameters
    ----------
    model
        a causal model of transformers
    pieces
        token ids of documents; each is computed alone
    question
        token ids that follow them
    methods
        name -> method of `kvlab.reuse.methods`, or of your own: it takes a `Case` and returns `Made`
    answer_tokens
        greedy tokens behind the question; all methods follow those of the whole context

    Returns
    -------
    list of rows
        ``computed``: share of the context's tokens, over all layers, that were computed; ``kl``: mean over the places
        of question and answer, in nats; ``same_token``: share of the answer's places with the same likeliest token;
        ``answer``: the method's own greedy tokens
    """
    check_model(model)
    if len(pieces) < 2 or not all(pieces) or not question:
        raise ConfigError("reuse is compared over two pieces or more and a question, none of them empty")
    check_tokens(model, question)
    alone = [capture(model, list(piece)) for piece in pieces]
    case = Case(model, alone, capture(model, [token for piece in pieces for token in piece]))
    said = _Said(model, case.whole, question, answer_tokens)
    rows = []
    for name, method in methods.items():
        made = method(case)
        rows.append({"method": name, "computed": made.computed, **said.behind(made.kv)})
    return rows


def compare_presses(
    model: Any,
    context: Sequence[int],
    question: Sequence[int],
    *,
    keep: float = 0.5,
    presses: Mapping[str, Score | Any] = PRESSES,
    answer_tokens: int = 8,
) -> Rows:
    """One row a press: of the context's tokens each head keeps the share `keep`, as a shorter prompt; the question is
    computed behind it. A press of kvpress keeps the share that it is made with. Rows are those of `compare_reuse`, with
    ``kept`` in the place of ``computed``."""
    if not context or not question:
        raise ConfigError("presses are compared over a context and a question, neither of them empty")
    check_model(model)
    check_tokens(model, question)
    whole = capture(model, list(context))
    said = _Said(model, whole, question, answer_tokens)
    rows = []
    for name, press in presses.items():
        kv = pressed(model, whole, press) if hasattr(press, "compress") else pruned(model, whole, press, keep)
        rows.append({"press": name, "kept": kv.num_positions / whole.num_positions, **said.behind(kv)})
    return rows


def over_texts(rows: Sequence[Mapping[str, Any]], by: str = "method") -> Rows:
    """Rows of several texts as one row each method: means, and with ``_sd`` the standard deviation over texts."""
    found: Rows = []
    for name in dict.fromkeys(row[by] for row in rows):
        same = [row for row in rows if row[by] == name]
        made: dict[str, Any] = {by: name, "texts": len(same)}
        for column in (column for column in MEASURED if column in same[0]):
            values = [float(row[column]) for row in same]
            made |= {column: fmean(values), f"{column}_sd": stdev(values) if len(values) > 1 else 0.0}
        found.append(made)
    return found


def with_seconds(rows: Sequence[Mapping[str, Any]], num_tokens: int, prefill: Prefill, load_s: float = 0.0) -> Rows:
    """`rows` of `compare_reuse`, with the ``seconds`` that a context of `num_tokens` takes by a cost model.

    Those of the share that a method computes, as if its tokens were spread evenly over the context, and `load_s`, for
    loading the pieces' KV, unless everything is computed. Choosing tokens and turning keys cost nothing here.
    """
    whole = float(prefill.seconds(np.array([num_tokens]))[0])
    return [{**row, "seconds": row["computed"] * whole + (load_s if row["computed"] < 1 else 0.0)} for row in rows]


class _Said:
    """What the model says behind the whole context, which others are compared with."""

    def __init__(self, model: Any, whole: KV, question: Sequence[int], answer_tokens: int) -> None:
        self._model, self._question, self._count = model, list(question), answer_tokens
        answer = answered(model, whole, question, answer_tokens)
        self._asked = [*question, *answer[:-1]]
        self._truth = _logprobs(model, whole, self._asked)

    def behind(self, kv: KV) -> dict[str, Any]:
        found, truth = _logprobs(self._model, kv, self._asked), self._truth
        kl = (truth.exp() * (truth - found)).sum(-1)
        same = truth[-self._count :].argmax(-1) == found[-self._count :].argmax(-1)
        return {
            "kl": float(kl.mean()),
            "same_token": float(same.double().mean()),
            "answer": answered(self._model, kv, self._question, self._count),
        }


@torch.inference_mode()
def _logprobs(model: Any, kv: KV, tokens: Sequence[int]) -> torch.Tensor:
    """Behind each of `tokens`, which follow `kv`: float64 (tokens, vocabulary)."""
    places = torch.arange(kv.num_positions, kv.num_positions + len(tokens))[None]
    logits = model(torch.tensor([list(tokens)]), past_key_values=to_cache(kv), position_ids=places).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


@torch.inference_mode()
def answered(model: Any, kv: KV, question: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens behind `kv` and `question`, by transformers."""
    cache, asked, tokens, at = to_cache(kv), list(question), [], kv.num_positions
    for _ in range(count):
        places = torch.arange(at, at + len(asked))[None]
        logits = model(torch.tensor([asked]), past_key_values=cache, position_ids=places, logits_to_keep=1).logits
        at += len(asked)
        asked = [int(logits[0, -1].argmax())]
        tokens += asked
    return tokens
