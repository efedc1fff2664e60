"""Many requests with shared prefixes through a memory tier a tenth of what they touch."""

import random

import torch

from tests.connectors.engine import connector, engine, generate, text_ids

NUM_REQUESTS = 500 if torch.cuda.is_available() else 32


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    text = text_ids()
    documents = [list(text[i * 30 : i * 30 + 256]) for i in range(8)]
    return [
        rng.choice(documents) + [rng.randrange(1000, 40000) for _ in range(rng.randrange(8, 80))]
        for _ in range(NUM_REQUESTS)
    ]


def test_evictions_under_load_change_no_token():
    asked = prompts()
    with engine(None) as llm:
        want = [answer.tokens for answer in generate(llm, asked, max_tokens=8)]
    touched = sum(len({tuple(p[:64]) for p in asked}) * 64 for _ in range(4)) + 40 * len(asked)
    budget = touched * 46080 // 10
    with engine([f"memory://?size={budget}"]) as llm:
        got = generate(llm, asked, max_tokens=8)
        scheduler = connector(llm).scheduler
        assert [answer.tokens for answer in got] == want
        assert scheduler.index.num_evictions > 0
        assert scheduler.counters["hit_requests"] > 0
        assert not connector(llm).hook_errors
