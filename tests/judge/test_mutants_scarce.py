"""The judge is judged: pages that are scarce, the engine's own cache, and storage."""

import pytest

from tests.support.mutant_runs import MutantTests, caught_in
from tests.support.mutants import CAUGHT_BY


@pytest.mark.timeout(1200)  # the first of its tests runs all engines
class TestWithFewPagesOrStorage(MutantTests):
    names = caught_in("few", "prefix", "storage")


def test_every_mutant_is_in_one_of_the_two_files():
    assert len(CAUGHT_BY) == len(caught_in("plain", "exact", "lora")) + len(TestWithFewPagesOrStorage.names)
