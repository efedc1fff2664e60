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
def verdicts():
    """Of every mutant; and of the correct connector in each trap that catches one."""
    names = sorted((name for name in CAUGHT_BY if name not in NEVER_END), key=lambda name: CAUGHT_BY[name][1] in LAST)
    cases = [(subject(name, CAUGHT_BY[name][0]), [CAUGHT_BY[name][0]]) for name in names]
    used = {trap for trap, _ in CAUGHT_BY.values()}
    right = [(subject("SmallConnector"), sorted(used - set(IN_A_FOLDER)))]
    right.append((subject("SmallConnector", *IN_A_FOLDER), sorted(used & set(IN_A_FOLDER))))
    found = judge_each([*right, *cases], deadline_s=600)
    ever = [(subject(name), [CAUGHT_BY[name][0]]) for name in NEVER_END]
    found += judge_each(ever, deadline_s=600, patience_s=1)  # what never comes need not be waited for
    rows = {report.connector.rpartition(":")[2]: report.verdicts[0] for report in found[2:]}
    return rows, [verdict for report in found[:2] for verdict in report.verdicts]


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_fault_is_caught(verdicts, name):
    found = verdicts[0][name]
    assert found.verdict == CAUGHT_BY[name][1], f"{found.trap}: {found.why}"
    assert found.why
    assert (found.first is not None) == (found.verdict == "failed")


def test_a_correct_connector_is_not(verdicts):
    wrong = {one.trap: f"{one.verdict}: {one.why}" for one in verdicts[1] if one.verdict != "held"}
    assert wrong == {}
