"""Random traffic, the same for the same seed."""

import random
from collections.abc import Sequence

from kvlab.judge.answers import Ask
from kvlab.judge.stage import Stage

REQUESTS, AT_ONCE = 80, 10


def storm(stage: Stage, documents: Sequence[tuple[int, ...]]) -> None:
    """Prompts cut from `documents` anywhere, some with endings of their own; most ask for a few of them."""
    rng, prompts = stage.rng, list(documents)
    for document in documents:
        for length in rng.sample(range(20, len(document)), 3):
            ending = tuple(rng.randrange(64, 4096) for _ in range(rng.randrange(1, 60)))
            prompts += [document[:length], document[:length] + ending]
    prompts += [documents[0][:n] for n in (31, 32, 33, 63, 64, 65, 128, 129)]
    rng.shuffle(prompts)
    planned = [_ask(rng, prompts) for _ in range(REQUESTS)]
    bursts = [rng.choice([0, 0, 1, 1, 2, 5]) for _ in range(8 * REQUESTS)]
    if stage.is_rehearsal:
        stage.ask(*(Ask(prompt) for prompt in prompts))
        return

    def arrivals(live: int) -> list[Ask] | None:
        if not planned:
            return None
        count = min(bursts.pop() if bursts else 1, AT_ONCE - live)
        return [planned.pop() for _ in range(min(max(count, 0), len(planned)))]

    stage.answer(arrivals)
    stage.settle()
    stage.ask(*(Ask(prompt) for prompt in prompts))


def _ask(rng: random.Random, prompts: Sequence[tuple[int, ...]]) -> Ask:
    often = prompts[int(rng.random() ** 3 * len(prompts))]
    return Ask(
        often if rng.random() < 0.7 else rng.choice(prompts),
        salt=rng.choice(["", "", "", "a", "b"]),
        max_tokens=rng.choice([1, 4, 8]),
        n=rng.choice([1] * 9 + [2]),
        priority=rng.choice([0, 0, 0, 1, -1]),
        patience=int(rng.random() ** 2 * 30) + 1 if rng.random() < 0.15 else 0,
    )
