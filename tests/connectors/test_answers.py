"""How far two answers lie apart, from the logprobs of a few likeliest tokens."""

import math

import pytest
import torch

from kvlab.connectors.vllm.by_hand.answers import divergence


def likeliest(logprobs, count):
    top = logprobs.topk(count)
    return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_it_is_a_lower_bound_and_exact_where_all_tokens_are_named(seed):
    source = torch.Generator().manual_seed(seed)
    scale = 0.1 + seed
    ours, theirs = (torch.log_softmax(scale * torch.randn(50, generator=source).double(), 0) for _ in range(2))
    true = float((ours.exp() * (ours - theirs)).sum())
    assert divergence(likeliest(ours, 50), likeliest(theirs, 50)) == pytest.approx(true, abs=1e-9)
    for count in (1, 5, 20, 49):
        assert divergence(likeliest(ours, count), likeliest(theirs, count)) <= true + 1e-9


def test_another_likeliest_token_is_far_away():
    ours = {1: math.log(0.9), 2: math.log(0.09)}
    theirs = {3: math.log(0.9), 4: math.log(0.001)}
    assert divergence(ours, theirs) > 5
    assert divergence(ours, ours) == pytest.approx(0, abs=1e-9)
