"""The suites say what is missing or wrong, and a subclass that forgot something does not pass unseen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.stores.eviction import POLICIES, get_policy
from kvlab.stores.eviction.queues import LRUPolicy
from kvlab.testing import PolicyTests

ROOT = Path(__file__).resolve().parent.parent


class PolicySuite(PolicyTests):
    name = ""
    examples = 30

    def policy(self):
        return get_policy(self.name)


for one in POLICIES:  # a test class each
    globals()[f"Test_{one}"] = type(f"Test_{one}", (PolicySuite,), {"name": one})
del PolicySuite


class Clinging(LRUPolicy):
    def discard(self, key):
        pass


class Pinless(LRUPolicy):
    def victim(self, pinned=()):
        return next(iter(self._order), None)


class Doubled(LRUPolicy):
    def __init__(self):
        self._order = []

    def admit(self, key, size):
        self._order.append(key)

    def touch(self, key):
        pass

    def touch_all(self, keys):
        pass

    def discard(self, key):
        if key in self._order:
            self._order.remove(key)

    def evict(self):
        return self._order.pop(0) if self._order else None


class Random(LRUPolicy):
    calls = 0

    def victim(self, pinned=()):
        Random.calls += 1
        keys = [key for key in self._order if key not in pinned]
        return keys[Random.calls % len(keys)] if keys else None


@pytest.mark.parametrize(
    ("wrong", "test", "words"),
    [
        (Clinging, "test_one_who_holds_nothing_has_no_victim", None),
        (Clinging, "test_a_key_that_left_may_come_back", ""),
        (Pinless, "test_what_is_pinned_is_no_victim", "must be the one key not pinned"),
        (Doubled, "test_a_key_that_enters_again_is_there_once", "must only change its size"),
        (Random, "test_a_victim_stays_until_it_is_discarded", "only choose"),
        (Random, "test_it_holds_for_any_sequence", None),
        (Random, "test_the_same_calls_give_the_same_victims", ""),
    ],
)
def test_a_wrong_policy_fails_and_is_told_why(wrong, test, words):
    class Suite(PolicyTests):
        examples = 50

        def policy(self):
            return wrong()

    if words is None:  # right in this respect
        getattr(Suite(), test)()
        return
    with pytest.raises(BaseException) as caught:
        getattr(Suite(), test)()
    assert words in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))


FORGOTTEN = """
from kvlab.testing import BudgetTests, PolicyTests, StoreTests

class TestStore(StoreTests): pass
class TestBudget(BudgetTests): pass
class TestPolicy(PolicyTests): pass
"""
SERDE = """
import pytest
from kvlab.serde.naive import NaiveSerde
from kvlab.testing import SerdeTests

class Wrong(NaiveSerde):
    lossless = False
    needs_kv_axes = True
    def decode(self, encoded, out=None):
        return super().decode(encoded)

class TestWrong(SerdeTests):
    mutations = 10
    @pytest.fixture(scope="class")
    def serde(self):
        return Wrong()
"""


def judged(tmp_path: Path, text: str, *options: str) -> str:
    (tmp_path / "test_it.py").write_text(text)
    without = [option for plugin in ("cacheprovider", "nbmake", "xdist") for option in ("-p", f"no:{plugin}")]
    command = [sys.executable, "-m", "pytest", "-q", *without, *options, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 1, done.stdout[-2000:]
    return done.stdout


def test_a_suite_without_its_method_fails_and_names_it(tmp_path):
    told = judged(tmp_path, FORGOTTEN, "-k", "missing_key or used_bytes or no_victim")
    assert "TestStore must define `def open(self, where, max_bytes)`" in told
    assert "TestBudget must define `def open(self, where, max_bytes)`" in told
    assert "TestPolicy must define `def policy(self)`" in told


def test_a_wrong_serde_is_told_what_is_wanted(tmp_path):
    told = judged(tmp_path, SERDE, "-k", "opaque or non_finite or given_memory")
    assert "encode with needs_kv_axes must refuse pages with a ConfigError that names the axes" in told
    assert "a lossy serde must refuse NaN and infinity: ConfigError with the words 'NaN or infinity'" in told
    assert "Failed: decode must" in told or "data_ptr" in told
