"""kvlab's connector in the judge's traps, by the suite that others inherit; and what the suite says of a failure."""

import pytest

from kvlab.judge import Report, Verdict
from kvlab.testing import ConnectorTests


@pytest.mark.timeout(1200)  # the first of its tests runs all engines
class TestKVLab(ConnectorTests):
    connector = "kvlab.connectors.vllm:KVLabConnector"
    extra = {  # noqa: RUF012
        "tiers": ["memory://?size=64MiB", "file://{storage}?size=1GiB"],
        "chunk_tokens": 64,
        "admission": False,  # on a busy machine a load may be slower than a recompute
        "lookup_timeout_ms": 60_000,
    }


class Suite(ConnectorTests):
    __test__ = False
    connector = "m:C"
    allowed = {"lora": "refused"}  # noqa: RUF012


def outcome(trap, verdict, why=""):
    report = Report("m:C", "{}", [Verdict(trap, "about it", verdict, why)])
    Suite().test_answers_are_those_of_an_engine_without_it(report, trap)


def test_a_verdict_that_is_allowed_is_the_only_one():
    outcome("edges", "held")
    outcome("restart", "not run")
    outcome("lora", "refused")
    with pytest.raises(AssertionError, match="lora: held"):
        outcome("lora", "held")


@pytest.mark.parametrize("verdict", ["failed", "crashed", "hung", "refused", "no hits"])
def test_a_failure_says_what_was_found(verdict):
    with pytest.raises(AssertionError, match=f"edges: {verdict}: token 3 .*about it"):
        outcome("edges", verdict, "token 3 differs")
