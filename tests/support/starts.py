"""What a test starts: a vLLM engine (marker `engine`), vLLM's API server (`server`), or neither.

The markers are set at collection, by what a test's code names: see `started_by`. A test that starts what its markers do
not say fails: `check_may_start` is called where engines and servers are started.
"""

import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

ALLOWED = "KVLAB_TEST_MAY_START"  # the running test's markers; its child processes inherit it
SERVERS = {"kvlab.serving.runs.run", "kvlab.serving.server.Server"}
ENGINES = {"kvlab.judge.engine.running", "kvlab.judge.run.judge", "kvlab.judge.run.judge_each"}
PROGRAM = re.compile(r"\bLLM\(|\bwith engine\(")  # in the text of a program for another process


def started_by(item: pytest.Item) -> set[str]:
    """Markers for all that the test, its fixtures, and the functions of `tests` they name may start."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    to_read = [item.function, *(each.func for several in definitions for each in several)]
    found, seen = set(), set()
    while to_read:
        function = _inner(to_read.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for name, value in _named(code, function.__globals__, getattr(item, "cls", None)):
            if name == "LLM" or (isinstance(value, str) and PROGRAM.search(value)) or _path(value) in ENGINES:
                found.add("engine")
            elif _path(value) in SERVERS:
                found.add("server")
            elif _path(value).startswith("tests."):
                to_read += vars(value).values() if inspect.isclass(value) else [value]
    return found


def _inner(function: Any) -> Any:
    """Behind decorators, Hypothesis' too."""
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    return inspect.unwrap(function) if callable(function) else function


def _path(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', '')}"


def _named(code: Any, module: dict[str, Any], owner: type | None) -> Iterator[tuple[str, Any]]:
    """Names in a function and the functions within it, with what they mean in its module or its class."""
    for name in code.co_names:
        yield name, module.get(name, getattr(owner, name, None))
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _named(constant, module, owner)
        else:
            yield "", constant


def check_may_start(what: str) -> None:
    """Raise if the running test is not marked with `what`. Outside pytest everything may start."""
    if what not in os.environ.get(ALLOWED, what).split():
        test = os.environ.get("PYTEST_CURRENT_TEST", "the test")
        raise RuntimeError(f"{test} starts what its markers do not say; add @pytest.mark.{what} to it")


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: every engine imports vLLM's core, every server is a process."""
    if event == "import" and args[0] == "vllm.v1.engine.core":
        check_may_start("engine")
    elif event == "subprocess.Popen" and "vllm.entrypoints" in str(args[1]):
        check_may_start("server")
