"""A secret that tests plant, and all the places where it must not come out."""

import contextlib
import io
import logging
import traceback

import pytest

from kvlab.errors import KVLabError
from kvlab.stores.redis.url import PASSWORD

MARK = "S3cr3t-hunter2"


def everything_of(error):
    """All that a report of this error could print: the chain of causes, with arguments and attributes."""
    seen, texts = set(), []
    queue = [error]
    while queue:
        one = queue.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        texts += [str(one), repr(one), repr(one.args), repr(vars(one)), "".join(traceback.format_exception(one))]
        queue += [one.__cause__, one.__context__]
    return "\n".join(texts)


def found(text, mark=MARK):
    """A mark counts as shown if a good part of it is."""
    return [part for part in (mark, mark[:7], mark[-7:]) if part in text]


@pytest.fixture
def attempt(caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv(PASSWORD, raising=False)

    def attempt(work):
        caplog.clear()
        out, caught = io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                work()
            except (KVLabError, SystemExit) as error:
                caught = error
        shown = f"{everything_of(caught) if caught else ''}\n{caplog.text}\n{out.getvalue()}"
        for record in caplog.records:
            shown += repr(vars(record))
        # The source lines of this test, which a traceback quotes, hold no mark: it is in a variable.
        assert not found(shown), shown[:2000]
        return caught

    return attempt
