"""The judge is judged: names, pages and adapters. The other half is in test_mutants_scarce.py, for another worker."""

import pytest

from tests.support.mutant_runs import MutantTests, caught_in


@pytest.mark.timeout(1200)  # the first of its tests runs all engines
class TestWithPagesForAll(MutantTests):
    names = caught_in("plain", "exact", "lora")
