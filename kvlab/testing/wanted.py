"""What a suite wants, said in its failures."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def to_define(suite: object, signature: str, gives: str) -> NotImplementedError:
    """The error of a method that a subclass of a suite must define."""
    return NotImplementedError(f"{type(suite).__name__} must define `def {signature}`, which returns {gives}")


@contextmanager
def refused(kind: type[Exception], wanted: str, match: str = "") -> Iterator[None]:
    """What is within must raise `kind`, with a message that `match` is found in; else the test fails with `wanted`."""
    try:
        yield
    except kind as error:
        if not re.search(match, str(error)):
            pytest.fail(f"{wanted}; the {kind.__name__} says: {error}")
    else:
        pytest.fail(f"{wanted}; nothing was raised")
