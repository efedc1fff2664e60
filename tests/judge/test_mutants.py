"""The judge is judged: a small correct connector passes, and each connector with one fault is caught by its trap."""

import pytest

from kvlab.judge import Subject
from kvlab.judge.run import judge_each
from tests.support.mutants import CAUGHT_BY

pytestmark = pytest.mark.timeout(1200)  # of all engines, which one fixture runs
MODULE = {"SmallConnector": "tests.support.small_connector"}
IN_A_FOLDER = ("flipped_objects", "swapped_objects", "cut_objects", "vanishing_objects")
LAST = ("crashed",)  # these end their process, which others share
NEVER_END = ("NeverDone", "KeepsPages")


def subject(name, *traps):
    extra = {"folder": "{storage}"} if set(traps) & set(IN_A_FOLDER) else {}
    return Subject(name, MODULE.get(name, "tests.support.mutants"), extra)


@pytest.fixture(scope="module")
def verdicts(request):
    """Of every mutant whose test was chosen; and of the correct connector in each trap that catches one."""
    items = [item for item in request.session.items if item.path == request.path]
    chosen = {item.callspec.params["name"] for item in items if hasattr(item, "callspec")}
    names = [name for name in CAUGHT_BY if name in chosen and name not in NEVER_END]
    names.sort(key=lambda name: CAUGHT_BY[name][1] in LAST)
    cases = [(subject(name, CAUGHT_BY[name][0]), [CAUGHT_BY[name][0]]) for name in names]
    used = {trap for trap, _ in CAUGHT_BY.values()}
    if any(not hasattr(item, "callspec") for item in items):
        cases.append((subject("SmallConnector"), sorted(used - set(IN_A_FOLDER))))
        cases.append((subject("SmallConnector", *IN_A_FOLDER), sorted(used & set(IN_A_FOLDER))))
    found = judge_each(cases, deadline_s=600) if cases else []
    ever = [(subject(name), [CAUGHT_BY[name][0]]) for name in NEVER_END if name in chosen]
    if ever:
        found += judge_each(ever, deadline_s=600, patience_s=5)  # what never comes need not be waited for
    by_name = [(report.connector.rpartition(":")[2], report.verdicts) for report in found]
    rows = {name: verdicts[0] for name, verdicts in by_name if name in CAUGHT_BY}
    return rows, [one for name, verdicts in by_name if name not in CAUGHT_BY for one in verdicts]


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_fault_is_caught(verdicts, name):
    found = verdicts[0][name]
    assert found.verdict == CAUGHT_BY[name][1], f"{found.trap}: {found.why}"
    assert found.why
    assert (found.first is not None) == (found.verdict == "failed")


def test_a_correct_connector_is_not(verdicts):
    wrong = {one.trap: f"{one.verdict}: {one.why}" for one in verdicts[1] if one.verdict != "held"}
    assert wrong == {}
