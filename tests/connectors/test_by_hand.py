"""Which tokens of a request hand-written KV serves."""

from types import SimpleNamespace

import torch

from kvlab.connectors.captured import KV
from kvlab.connectors.vllm.by_hand.written import ByHand


def request_of(salt, tokens, num_generated=0):
    return SimpleNamespace(
        cache_salt=salt,
        prompt_token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        num_tokens=len(tokens) + num_generated,
        sampling_params=SimpleNamespace(prompt_logprobs=None, extra_args=None),
        pooling_params=None,
        skip_reading_prefix_cache=False,
    )


def test_the_prompts_last_token_is_computed_also_after_a_preemption():
    half = (torch.zeros(5, 1, 2),)
    by_hand = ByHand(None)
    salt = by_hand.add(KV(half, half, tuple(range(5)), 5, "", (None,)))
    assert by_hand.match(request_of(salt, range(5)), 0) == 4
    assert by_hand.match(request_of(salt, range(5), num_generated=3), 0) == 4
    assert by_hand.match(request_of(salt, range(9)), 2) == 3
    assert by_hand.match(request_of(salt, [7, *range(1, 5)]), 0) == 0
