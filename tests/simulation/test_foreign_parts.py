"""Policies, rules and functions of users that fail in a simulation: one line that names them."""

from collections import OrderedDict

import pytest

import kvlab
from kvlab.errors import ConfigError, FormatError
from kvlab.simulation.replay_tiers import Admission
from kvlab.stores.admission import AdmissionRule
from kvlab.stores.eviction import EvictionPolicy

PROMPTS = [[number % 7 * 1000 + at for at in range(64)] for number in range(40)]


def failing(what):
    """An LRU policy, but for one thing."""

    class Mine(EvictionPolicy):
        name = "mine"

        def __init__(self):
            self.keys = OrderedDict()

        def admit(self, key, size):
            if what == "admit":
                raise ValueError("no room")
            self.keys[key] = None

        def touch(self, key):
            if what == "touch":
                raise RuntimeError("of\ntwo lines")
            if key in self.keys:
                self.keys.move_to_end(key)

        def discard(self, key):
            if what == "discard":
                raise KeyError(key)
            self.keys.pop(key, None)

        def victim(self, pinned=()):
            if what in VICTIMS:
                return VICTIMS[what]
            return next((key for key in self.keys if key not in pinned), None)

    return Mine


VICTIMS = {"a stranger": 10**9, "none": None, "a list": [1], "text": "x", "truth": True}
CALLS = {
    "simulate": lambda policy: kvlab.simulate(PROMPTS, "8 blocks", policy=policy, chunk_tokens=16),
    "two tiers": lambda policy: kvlab.simulate(PROMPTS, ["4 blocks", "8 blocks"], policy=policy, chunk_tokens=16),
    "why": lambda policy: kvlab.why(PROMPTS, -1, "8 blocks", policy=policy, chunk_tokens=16),
    "sweep": lambda policy: kvlab.sweep(PROMPTS, ["8 blocks"], [policy], workers=1, progress=False, chunk_tokens=16),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("what", ["admit", "touch", "discard", *VICTIMS])
def test_a_policy_that_fails_is_named_in_one_line(what, call):
    with pytest.raises(ConfigError, match=r"^policy 'mine' (failed: |names |lets none )[^\n]*PolicyTests") as raised:
        CALLS[call](failing(what))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", CALLS)
def test_one_that_does_not_is_as_lru(call):
    mine, lru = CALLS[call](failing("")), CALLS[call]("lru")
    if call in ("simulate", "two tiers"):
        assert mine.hit_tokens.tolist() == lru.hit_tokens.tolist()


@pytest.mark.parametrize("answer", [ValueError("r"), "tensor"])
def test_a_rule_that_fails_is_named_in_one_line(answer):
    class Rule(AdmissionRule):
        def admit(self, key, end_token):
            if answer == "tensor":
                import numpy as np

                return np.array([1, 2])
            raise answer

    with pytest.raises(ConfigError, match=r"^admission rule 'Rule' failed: ValueError: "):
        kvlab.simulate(PROMPTS, "80 blocks", admission=Admission(rule=Rule), chunk_tokens=16)


@pytest.mark.parametrize("size", [5, "x", lambda _: None, lambda _: -5, lambda _: 0, lambda _: float("nan")])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(
        ConfigError, match="object_bytes must be a function from tokens to bytes above 0; of 16 it gives"
    ):
        kvlab.simulate(PROMPTS, "8KiB", object_bytes=size, chunk_tokens=16)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"admission": "x"}, "admission must be a number of uses or an Admission, got 'x'"),
        ({"admission": 1.5}, "admission must be"),
        ({"admission": True}, "admission must be"),
        ({"prefill": 5}, "prefill must be a Prefill, got 5"),
        ({"policies": 5}, "policies must be a list of policies, got 5"),
        ({"policies": "lru"}, "policies must be a list of policies, got 'lru'"),
        ({"block_tokens": "16"}, "block_tokens must be a whole number above 0, got '16'"),
    ],
)
def test_an_argument_of_another_kind_is_named(named, words):
    with pytest.raises(ConfigError, match=words):
        kvlab.why(PROMPTS, tiers="8 blocks", **named)


@pytest.mark.parametrize("trace", [None, 5, {}])
def test_what_is_no_trace_is_named(trace):
    with pytest.raises(ConfigError, match="a trace must be a Traffic, a path or prompts of tokens, got "):
        kvlab.why(trace, -1, "8 blocks")


def test_a_line_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "trace.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(FormatError, match=r"trace.jsonl line 1 is not JSON of a request: it is nested too deeply"):
        kvlab.simulate(tmp_path / "trace.jsonl", "8 blocks")
