"""Many small requests at once: HTTP/1.1 answers one at a time on a connection."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvlab.errors import StoreError

T = TypeVar("T")
THREADS = 16  # as many as connections are kept


def at_once(works: Sequence[Callable[[], T]], *, first_alone: bool) -> list[T]:
    """What each gives, in order. Each ends by a deadline of its own. After a failure no other begins, and it is raised.
    With `first_alone` the first is the try whether the server is back: one call may try, and others may not."""
    failures: list[StoreError] = []

    def run(work: Callable[[], T]) -> T | None:
        if failures:
            return None
        try:
            return work()
        except StoreError as error:
            failures.append(error)
            return None

    if len(works) <= 2:  # a thread takes as long to start as a server nearby to answer
        return [work() for work in works]
    tried = [works[0]()] if first_alone else []
    works = works[len(tried) :]
    with ThreadPoolExecutor(min(THREADS, len(works)), thread_name_prefix="kvlab-s3") as pool:
        found = tried + list(pool.map(run, works))
    if failures:
        raise failures[0]
    return found  # type: ignore[return-value]  # None stands for failures alone, or is what a work gave
