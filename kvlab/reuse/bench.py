"""How good is a context's KV? What the model says behind it, beside what it says behind the KV computed as a whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import capture, to_cache
from kvlab.errors import ConfigError
from kvlab.reuse.methods import METHODS, Case, Method


def compare_reuse(
    model: Any,
    pieces: Sequence[Sequence[int]],
    question: Sequence[int],
    *,
    methods: Mapping[str, Method] = METHODS,
    answer_tokens: int = 8,
) -> list[dict[str, Any]]:
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
    if len(pieces) < 2 or not all(pieces) or not question:
        raise ConfigError("reuse is compared over two pieces or more and a question, none of them empty")
    alone = [capture(model, list(piece)) for piece in pieces]
    context = [token for piece in pieces for token in piece]
    case = Case(model, alone, capture(model, context))
    answer = _answer(model, case.whole, question, answer_tokens)
    asked = [*question, *answer[:-1]]
    truth = _logprobs(model, case.whole, asked)
    rows = []
    for name, method in methods.items():
        made = method(case)
        found = _logprobs(model, made.kv, asked)
        kl = (truth.exp() * (truth - found)).sum(-1)
        same = truth[-len(answer) :].argmax(-1) == found[-len(answer) :].argmax(-1)
        rows.append(
            {
                "method": name,
                "computed": made.computed,
                "kl": float(kl.mean()),
                "same_token": float(same.double().mean()),
                "answer": _answer(model, made.kv, question, answer_tokens),
            }
        )
    return rows


@torch.inference_mode()
def _logprobs(model: Any, kv: KV, tokens: Sequence[int]) -> torch.Tensor:
    """Behind each of `tokens`, which follow `kv`: float64 (tokens, vocabulary)."""
    places = torch.arange(kv.num_positions, kv.num_positions + len(tokens))[None]
    logits = model(torch.tensor([list(tokens)]), past_key_values=to_cache(kv), position_ids=places).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


@torch.inference_mode()
def _answer(model: Any, kv: KV, question: Sequence[int], count: int) -> list[int]:
    """Greedy tokens behind `kv` and `question`."""
    cache, asked, tokens, at = to_cache(kv), list(question), [], kv.num_positions
    for _ in range(count):
        places = torch.arange(at, at + len(asked))[None]
        logits = model(torch.tensor([asked]), past_key_values=cache, position_ids=places, logits_to_keep=1).logits
        at += len(asked)
        asked = [int(logits[0, -1].argmax())]
        tokens += asked
    return tokens
