"""What every KV connector of vLLM promises, as tests. Subclass, name yours, inherit the tests::

class TestMyConnector(ConnectorTests):
    connector = "my_package.connector:MyConnector"
    extra = {"folder": "{storage}"}
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from kvlab.judge.report import HELD, NOT_RUN, Report
from kvlab.judge.run import judge
from kvlab.judge.subject import Subject
from kvlab.judge.traps import TRAPS


class ConnectorTests:
    """The suite: one test for each trap. Engines run in processes of their own, and the traps of a class share them;
    the prompts of each trap are its own."""

    connector: ClassVar[str] = ""  # MODULE:CLASS
    extra: ClassVar[Mapping[str, Any]] = {}  # kv_connector_extra_config; "{storage}" stands for a folder
    settings: ClassVar[Mapping[str, Any]] = {}  # further arguments of vLLM's LLM
    allowed: ClassVar[Mapping[str, str]] = {}  # trap -> a verdict other than "held" that is right
    model: ClassVar[str] = ""  # a checkpoint folder; default a small random model
    deadline_s: ClassVar[float] = 600.0  # for one trap, or one start of an engine

    @pytest.fixture(scope="class")
    def report(self, request: pytest.FixtureRequest) -> Report:
        """Of the traps whose tests were chosen."""
        suite = request.cls
        if not suite.connector:
            raise NotImplementedError(f'{suite.__name__} must define connector = "MODULE:CLASS"')
        own: list[Any] = [item for item in request.session.items if getattr(item, "cls", None) is suite]
        chosen = [item.callspec.params["trap"] for item in own]
        module, _, name = suite.connector.rpartition(":")
        subject = Subject(name, module, suite.extra, suite.settings)
        return judge(subject, traps=chosen, model=suite.model, deadline_s=suite.deadline_s)

    @pytest.mark.parametrize("trap", TRAPS)
    def test_answers_are_those_of_an_engine_without_it(self, report: Report, trap: str) -> None:
        found = next(one for one in report.verdicts if one.trap == trap)
        wanted = self.allowed.get(trap, HELD)
        if found.verdict == NOT_RUN and trap not in self.allowed:
            return
        assert found.verdict == wanted, f"{trap}: {found.verdict}: {found.why} ({found.about})"
