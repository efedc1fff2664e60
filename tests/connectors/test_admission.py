"""What is worth moving: the rule by itself, then in a real engine over a tier that is slow."""

import time

import pytest

from kvlab.connectors.vllm.scheduler.admission import FORGET_S, LoadAdmission, SaveAdmission
from kvlab.stores.wrappers import LatencyStore
from tests.connectors.engine import connector, drain, engine, generate, objects_of, prompt


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def rule(now) -> LoadAdmission:
    return LoadAdmission(clock=lambda: now[0])


def test_nothing_measured_is_loaded(rule):
    assert rule.is_worth({"memory": 100, "secondary": 100})
    rule.forward(1000, 1.0)
    assert rule.is_worth({"secondary": 100})


def test_the_slower_way_is_not_taken(rule):
    rule.forward(1000, 1.0)
    rule.loaded("secondary", 500, 1.0)
    rule.loaded("memory", 50_000, 1.0)
    assert not rule.is_worth({"secondary": 100})
    assert rule.is_worth({"memory": 100})
    assert rule.is_worth({"memory": 900, "secondary": 400}), "0.018 + 0.8 s against 1.3"
    assert not rule.is_worth({"memory": 300, "secondary": 400}), "0.006 + 0.8 s against 0.7"


def test_medians_count(rule):
    for seconds in (0.5, 1.0, 8.0):
        rule.forward(1000, seconds)
    assert rule.compute_seconds(2000) == 2.0
    for tokens in (100, 1200, 300):
        rule.loaded("secondary", tokens, 1.0)
    assert rule.load_rate("secondary") == 300
    assert not rule.is_worth({"secondary": 100})


def test_tokens_cost_what_they_add_to_a_step(rule):
    rule.forward(0, 0.6)  # a step without a prefill
    rule.loaded("secondary", 100, 0.5)
    rule.forward(100, 1.0)
    assert rule.compute_seconds(100) == pytest.approx(0.4)
    assert not rule.is_worth({"secondary": 100})
    for _ in range(2):
        rule.forward(0, 2.0)  # the machine grew slower
    assert rule.compute_seconds(100) == pytest.approx(0.4), "a prefill is compared with the steps of its own time"
    for _ in range(9):
        rule.forward(63, 9.0)  # too few to say what a token costs, too many for a step without
    for _ in range(2):
        rule.forward(100, 1.9)
    assert rule.compute_seconds(100) == 0, "and no less than nothing"


def test_a_load_between_steps_takes_whole_steps_while_others_are_served(rule):
    rule.forward(0, 0.8)
    rule.forward(1000, 1.8)
    rule.loaded("secondary", 1000, 0.9)
    rule.loaded("memory", 1000, 0.9)
    assert rule.is_worth({"secondary": 1000})
    rule.is_busy = True
    assert not rule.is_worth({"secondary": 1000}), "two steps, 1.6 s against 1.0"
    assert rule.is_worth({"memory": 1000})
    assert rule.is_worth({"secondary": 1600}), "1.44 s take two steps and save 1.6"


def test_a_slow_tier_is_tried_again(rule, now):
    rule.forward(1000, 1.0)
    rule.loaded("secondary", 50, 1.0)
    assert not rule.is_worth({"secondary": 100})
    now[0] = FORGET_S + 0.1
    assert rule.is_worth({"secondary": 100})


def test_a_small_load_says_nothing_of_a_large_one(rule):
    rule.forward(1000, 1.0)
    rule.loaded("secondary", 10, 1.0)
    assert not rule.is_worth({"secondary": 40})
    assert rule.is_worth({"secondary": 41})
    rule.loaded("secondary", 41, 1.0)
    assert not rule.is_worth({"secondary": 41})
    for _ in range(3):
        rule.loaded("secondary", 5, 0.001)
    assert rule.is_worth({"secondary": 20})
    assert not rule.is_worth({"secondary": 41})


def test_where_all_is_loaded_one_prompt_is_computed_now_and_then(rule, now):
    """An engine that starts over a full disk would never learn that computing is faster."""
    for _ in range(8):
        assert rule.is_worth({"secondary": 1000})
        rule.loaded("secondary", 1000, 1.0)
    assert rule.is_worth({"secondary": 63}), "too little to learn from"
    assert rule.is_worth({"memory": 1000})
    assert [rule.is_worth({"secondary": 1000}) for _ in range(3)] == [False, True, True]
    now[0] = FORGET_S
    assert not rule.is_worth({"secondary": 1000})
    rule.forward(1000, 0.5)
    for _ in range(8):
        rule.loaded("secondary", 1000, 1.0)
    assert not rule.is_worth({"secondary": 1000})


def test_who_waits_for_an_answer_has_something_to_win(rule):
    assert rule.is_worth_waiting(1, 10.0), "nothing measured"
    rule.forward(1000, 1.0)
    assert rule.is_worth_waiting(1000, 0.5)
    assert not rule.is_worth_waiting(1000, 0.51)
    for _ in range(98):
        rule.answered(held=False)
    assert rule.is_worth_waiting(1000, 1 / 66), "64 answers, none of them a hit"
    assert not rule.is_worth_waiting(1000, 1 / 65)
    rule.forward(0, 0.06)
    assert rule.is_worth_a_step(100), "nobody else is served, so the engine asks again at once"
    rule.is_busy = True
    assert not rule.is_worth_a_step(100)
    for _ in range(32):
        rule.answered(held=True)
    assert not rule.is_worth_a_step(100), "half of 0.1 s, against 0.06"
    assert rule.is_worth_a_step(130)


def test_off_loads_always():
    rule = LoadAdmission(enabled=False)
    rule.forward(1000, 1.0)
    for _ in range(64):
        rule.loaded("secondary", 10, 1.0)
        rule.answered(held=False)
    assert rule.is_worth({"secondary": 100})
    assert rule.is_worth_waiting(100, 10.0)


def test_saves_from_the_nth_sight_on():
    once, twice = SaveAdmission(1), SaveAdmission(2)
    assert once.is_due(b"a", 64)
    assert [twice.is_due(key, 64) for key in (b"a", b"b", b"a", b"a")] == [False, False, True, True]


def on_a_clock(rule: LoadAdmission, monkeypatch, *, step_s: float, token_s: float) -> list[tuple[int, float]]:
    """From now on no time passes for `rule`, and forward passes take what is said here. The passes as measured."""
    measured = []
    forward = rule.forward

    def told(prefill_tokens: int, seconds: float) -> None:
        measured.append((prefill_tokens, seconds))
        forward(prefill_tokens, step_s + prefill_tokens * token_s)

    rule._prefills.clear()
    rule._steps.clear()
    monkeypatch.setattr(rule, "forward", told)
    monkeypatch.setattr(rule, "_clock", lambda: 0.0)
    return measured


@pytest.mark.parametrize(("admission", "hits"), [(True, [299, 0, 0]), (False, [299, 299, 299])])
def test_a_tier_slower_than_computing(tmp_path, expected, monkeypatch, admission, hits):
    p = prompt(300)
    with engine([f"file://{tmp_path}?size=1GiB"], in_thread=True, admission=admission) as llm:
        scheduler = connector(llm).scheduler
        on_a_clock(scheduler.admission, monkeypatch, step_s=0.01, token_s=0.001)
        generate(llm, [p])
        drain(llm)
        secondary = objects_of(llm)
        secondary.store = LatencyStore(secondary.store, latency_s=0.5)  # slower than 300 tokens in 0.3 s
        saved = scheduler.counters["saved_tokens"]
        answers = [generate(llm, [p])[0] for _ in hits]
        assert [answer.hit for answer in answers] == hits
        assert all(answer.tokens == expected(p) for answer in answers)
        assert scheduler.counters["miss_not_worth_asking"] == hits.count(0)
        assert scheduler.counters["saved_tokens"] == saved, "the tier holds it, though nobody asked"
        assert not connector(llm).hook_errors


def test_what_is_measured_is_the_forward_pass_and_memory_is_worth_it(expected, monkeypatch):
    with engine(["memory://?size=256MiB"], admission=True) as llm:
        rule = connector(llm).scheduler.admission
        measured = on_a_clock(rule, monkeypatch, step_s=1.0, token_s=1.0)  # so that whatever a load takes, it is less
        for length in (300, 480, 700):
            p = prompt(length)
            measured.clear()
            start = time.perf_counter()
            assert generate(llm, [p])[0].tokens == expected(p)
            wall = time.perf_counter() - start
            passes = list(measured)
            again = generate(llm, [p])[0]
            assert (again.hit, again.tokens) == (length - 1, expected(p))
        ((computed, seconds),) = [each for each in passes if each[0]]
        assert computed == 700 - 480, "the blocks of the shorter prompt were loaded"
        assert 0 < seconds < wall, "a part of the call"
        assert all(seconds > 0 for _, seconds in passes)
        assert any(not prefill for prefill, _ in passes), "steps without a prefill are timed as well"
        assert rule.load_rate("memory") > 0


def test_only_what_comes_again_is_saved(expected):
    p, q = prompt(300), prompt(300, ending=0)
    with engine(["memory://?size=256MiB"], store_threshold=2) as llm:
        answers = [generate(llm, [each])[0] for each in (p, q, p, q)]
        assert [answer.tokens for answer in answers] == [expected(each) for each in (p, q, p, q)]
        # The four chunks that both begin with were saved at q's sight, the endings at their own second one.
        assert [answer.hit for answer in answers] == [0, 0, 256, 256]
        assert [generate(llm, [each])[0].hit for each in (p, q)] == [299, 299]
