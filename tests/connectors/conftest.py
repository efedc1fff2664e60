"""What the engine answers without a cache: computed once, by the engine itself."""

from collections.abc import Callable, Sequence

import pytest

from tests.connectors.engine import close_shared, engine, generate, prompt

EDGES = [31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129]
PROMPTS = [prompt(n) for n in [*EDGES, 90, 299, 300, 308, 480, 700]] + [
    prompt(n, ending=e) for n, e in [(300, 0), (300, 1), (480, 0), *((200, e) for e in range(8))]
]


@pytest.fixture(scope="session")
def expected() -> Callable[[Sequence[int]], list[int]]:
    with engine(None) as llm:
        answers = {tuple(p): generate(llm, [p])[0].tokens for p in PROMPTS}
    return lambda p: answers[tuple(p)]


@pytest.fixture(scope="session", autouse=True)
def _no_engine_left():
    yield
    close_shared()
