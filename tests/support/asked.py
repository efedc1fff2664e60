"""Random requests to an engine, and whether the page of one and the engine's own row tell the same."""

import random
from collections.abc import Iterator
from typing import Any

from kvlab.simulation.why import MissPage


def random_requests(seed: int, count: int, longest: int) -> Iterator[tuple[list[int], bool, dict[str, Any]] | None]:
    """Tokens, whether under a salt, and hints; None for a reset. They are beginnings of a few documents, asked for
    again, and some go another way."""
    draw = random.Random(seed)
    documents = [[draw.randrange(5, 1000) for _ in range(longest)] for _ in range(4)]
    for _ in range(count):
        tokens = draw.choice(documents)[: draw.randrange(longest // 8, longest)]
        if draw.random() < 0.4:
            tokens[draw.randrange(len(tokens))] = draw.randrange(5, 1000)
        if draw.random() < 0.03:
            yield None
        yield tokens, draw.random() < 0.25, draw.choice([{}] * 7 + [{"save": False}, {"load": False}])


def agree(page: MissPage, row: str, block_tokens: int) -> bool:
    """Whether a page and the reason in an engine's row tell the same of the same block. The row knows none of its
    other names."""
    if row == "never_stored":
        return page.reason in ("first", "differs", "within_chunk", "other_salt", "not_saved", "reset")
    if row:
        return page.reason == {"not_wanted": "not_loaded"}.get(row, row)
    return page.hit_tokens // block_tokens >= (page.tokens - 1) // block_tokens  # but for the last token's block
