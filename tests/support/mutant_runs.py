"""Runs connectors with one fault each through the traps that catch them; and the correct one through the same traps."""

import pytest

from kvlab.judge import Subject
from kvlab.judge.run import judge_each
from kvlab.judge.traps import GROUPS, TRAPS
from tests.support.mutants import CAUGHT_BY

CORRECT = "SmallConnector"
LAST = ("crashed", "hung")  # these end their process, which others share
PATIENCE_S = 5  # what never comes need not be waited for


def caught_in(*groups):
    """Names of the mutants whose trap is of one of these groups."""
    return [name for name, (trap, _) in CAUGHT_BY.items() if TRAPS[trap].group in groups]


def is_stored(trap):
    return GROUPS[TRAPS[trap].group].needs_storage


def subject(name, trap):
    module = "tests.support.small_connector" if name == CORRECT else "tests.support.mutants"
    return Subject(name, module, {"folder": "{storage}"} if is_stored(trap) else {})


class MutantTests:
    """Subclass with the names of mutants; the engines of a class share processes."""

    names = ()

    @pytest.fixture(scope="class")
    def verdicts(self, request):
        """Of every mutant whose test was chosen; and of the correct connector in each trap that catches one."""
        items = [item for item in request.session.items if getattr(item, "cls", None) is request.cls]
        chosen = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")}
        names = sorted(chosen, key=lambda name: CAUGHT_BY[name][1] in LAST)
        cases = [(subject(name, CAUGHT_BY[name][0]), [CAUGHT_BY[name][0]]) for name in names]
        if any(not hasattr(item, "callspec") for item in items):
            used = sorted({CAUGHT_BY[name][0] for name in self.names}, key=is_stored)
            for kind in (False, True):
                if traps := [trap for trap in used if is_stored(trap) is kind]:
                    cases.insert(0, (subject(CORRECT, traps[0]), traps))
        found = judge_each(cases, deadline_s=600, patience_s=PATIENCE_S)
        by_name = [(report.connector.rpartition(":")[2], report.verdicts) for report in found]
        rows = {name: verdicts[0] for name, verdicts in by_name if name != CORRECT}
        return rows, [one for name, verdicts in by_name if name == CORRECT for one in verdicts]

    def pytest_generate_tests(self, metafunc):
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.names)

    def test_a_fault_is_caught(self, verdicts, name):
        found = verdicts[0][name]
        assert found.verdict == CAUGHT_BY[name][1], f"{found.trap}: {found.why}"
        assert found.why
        assert (found.first is not None) == (found.verdict == "failed")

    def test_a_correct_connector_is_not(self, verdicts):
        wrong = {one.trap: f"{one.verdict}: {one.why}" for one in verdicts[1] if one.verdict != "held"}
        assert wrong == {}
