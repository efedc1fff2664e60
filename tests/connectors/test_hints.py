"""What a request may ask of the cache, and the share of one cache_salt."""

from types import SimpleNamespace

import pytest

from kvlab.connectors.vllm.scheduler.hints import Hints
from kvlab.connectors.vllm.scheduler.pins import Pins
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from tests.connectors.engine import connector, drain, engine, generate, prompt, worker
from tests.connectors.models import TOKEN_BYTES


def hints(given):
    return Hints.of(SimpleNamespace(kv_transfer_params={"kvlab": given}))


def test_hints_are_read_and_wrong_ones_turn_the_cache_off():
    assert Hints.of(SimpleNamespace(kv_transfer_params=None)) == Hints()
    assert Hints.of(SimpleNamespace(kv_transfer_params={"other": 1})) == Hints()
    assert hints({"pin": True, "ttl_s": 5}) == Hints(pin=True, ttl_s=5)
    assert hints({"save": False}) == Hints(save=False)
    for given, told in [
        ("pin", "must be an object"),
        ({"sav": False}, "unknown hint; known: load, save, exact, pin, release, ttl_s"),
        ({"pin": "yes"}, "pin must be true or false"),
        ({"pin": True, "ttl_s": True}, "ttl_s must be a number of seconds above 0"),
        ({"pin": True, "ttl_s": float("nan")}, "ttl_s must be"),
        ({"ttl_s": 5}, "give pin as well"),
        ({"pin": True, "release": True}, "exclude each other"),
        ({"wrong": ""}, "unknown hint"),
    ]:
        found = hints(given)
        assert told in found.wrong
        assert not found.load
        assert not found.save


@pytest.fixture
def pinned():
    """An index of 8 slots with four objects of two, of which four slots may be pinned; the clock is fed."""
    clock = SimpleNamespace(s=0.0)
    index = SlotIndex(8)
    pins = Pins(index, 4, clock=lambda: clock.s)
    for name in b"abcd":
        index.reserve(bytes([name]), 2)
    return index, pins, clock


def test_pins_hold_objects_until_they_end(pinned):
    index, pins, clock = pinned
    assert pins.pin([b"a", b"b", b"c", b"absent"], 10) == (2, 1), "half of the tier, and what is there"
    for name in b"efgh":
        assert index.reserve(bytes([name]), 2) is not None
    assert index.get(b"a"), "the oldest, and pinned"
    assert index.get(b"b")
    assert index.reserve(b"large", 6) is None, "more than what is not pinned"
    assert pins.pin([b"a"], None) == (1, 0), "a later pin replaces the time of the earlier one"
    clock.s = 10.0
    pins.expire()
    assert (len(pins), pins.num_slots) == (1, 2)
    pins.release([b"a", b"b"])
    assert (len(pins), pins.num_slots, index.num_leased_slots) == (0, 0, 0)
    assert index.reserve(b"large", 8) is not None


def test_a_pinned_object_that_is_dropped_frees_its_slots(pinned):
    index, pins, _ = pinned
    pins.pin([b"a"], None)
    index.drop(index.get(b"a"))
    assert index.num_free == 0, "its slots are leased"
    pins.expire()
    assert (index.num_free, pins.num_slots) == (2, 0)


def test_a_pin_of_an_object_that_came_again_holds_the_new_one(pinned):
    """The old one was dropped, as a load found it broken, and the prompt saved it again."""
    index, pins, _ = pinned
    pins.pin([b"a"], None)
    index.drop(index.get(b"a"))
    index.drop(index.get(b"b"))
    index.reserve(b"a", 2)
    assert pins.pin([b"a"], None) == (1, 0)
    assert (index.num_free, index.num_leased_slots, pins.num_slots) == (2, 2, 2)
    pins.release([b"a"])
    assert (index.num_leased_slots, pins.num_slots) == (0, 0)


def test_an_owner_stays_within_its_share():
    index = SlotIndex(10, max_owner_slots=4)
    for name in b"abc":
        assert index.make_room_of("salt", 2)
        index.reserve(bytes([name]), 2, owner="salt")
    assert [index.get(bytes([name])) is not None for name in b"abc"] == [False, True, True]
    index.touch([b"b"])
    assert index.make_room_of("other", 4)
    index.reserve(b"other", 4, owner="other")
    assert index.make_room_of("salt", 2)
    assert index.get(b"b"), "used since"
    assert index.get(b"c") is None
    index.lease(index.get(b"b"))
    assert not index.make_room_of("salt", 4)
    assert index.get(b"b")
    assert not index.make_room_of("salt", 5), "more than its share"
    assert index.make_room_of(None, 10), "prompts without a salt have no share"
    index.clear()
    assert index._owned == {}


def ask(llm, p, salt=None, **given):
    params = {"extra_args": {"kv_transfer_params": {"kvlab": given}}} if given else {}
    (answer,) = generate(llm, [p], salt=salt, **params)
    drain(llm)
    return answer


def other_prompts(count):
    """Of 300 tokens, with nothing in common."""
    return [[1000 + number, *prompt(299)] for number in range(count)]


def test_hints_of_requests_to_an_engine():
    size = 40 * 32 * TOKEN_BYTES  # four prompts of 300 tokens
    with engine([f"memory://?size={size}"]) as llm:
        scheduler = connector(llm).scheduler
        first, second, third, *others = other_prompts(9)
        assert ask(llm, first, save=False).hit == 0
        assert ask(llm, first).hit == 0, "it was not saved"
        assert ask(llm, first, load=False).row["miss"] == "not_wanted"
        wrong = ask(llm, first, lod=False)
        assert (wrong.hit, wrong.row["miss"]) == (0, "wrong_hint")
        assert wrong.row["hint"] == "unknown hint; known: load, save, exact, pin, release, ttl_s"
        assert ask(llm, [5, 6, 7], lod=False).row["miss"] == "wrong_hint", "of a prompt that no hit could serve as well"
        assert ask(llm, first, pin=True).row["pinned_objects"] == 6, "four chunks of 64, a tail and a partial block"
        for p in others:
            ask(llm, p)
        assert ask(llm, first).hit == 299, "six prompts went through a tier of four"
        assert ask(llm, others[0]).hit == 0
        assert ask(llm, second, pin=True).row["pinned_objects"] == 6
        refused = ask(llm, third, pin=True)
        assert refused.row["pinned_objects"] < 6, "half of the tier is pinned"
        assert scheduler.counters["pins_refused"] == 6 - refused.row["pinned_objects"]
        ask(llm, first, release=True)
        ask(llm, second, release=True)
        ask(llm, third, release=True)
        assert (len(scheduler.pins), scheduler.index.num_leased_slots) == (0, 0)
        assert not connector(llm).hook_errors


def test_a_salt_has_its_share_and_metrics_tell_of_every_tier(tmp_path):
    from prometheus_client import REGISTRY

    size = 40 * 32 * TOKEN_BYTES
    settings = {"disable_log_stats": False}
    tiers = [f"memory://?size={size}", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, settings, in_thread=True, max_salt_share=0.25) as llm:
        first, second, third = other_prompts(3)
        ask(llm, first)
        ask(llm, second, salt="a")
        ask(llm, third, salt="a")  # its own older prompt leaves
        assert ask(llm, first).row["tier"] == "memory"
        assert ask(llm, third, salt="a").row["tier"] == "memory"
        assert ask(llm, second, salt="a").row["tier"] == "disk"
        drain(llm)
        worker(llm).tiers._worker.server._ask_rows()  # as it does now and then
        worker(llm).poll()
        ask(llm, [5, 6, 7])
        found = {
            (sample.name.removeprefix("vllm:kvlab_"), sample.labels.get("tier")): sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
        }
        assert found["loaded_bytes_total", "memory"] == 2 * 320 * TOKEN_BYTES
        assert found["loaded_bytes_total", "disk"] == 320 * TOKEN_BYTES
        assert found["load_seconds_count", "disk"] == 1
        assert found["tier_used_bytes", "memory"] == (320 + 320 + 32) * TOKEN_BYTES, "whole pages of three prompts"
        assert found["tier_max_bytes", "memory"] == size
        assert found["tier_max_bytes", "disk"] == 1 << 30
        assert found["tier_used_bytes", "disk"] > 3 * 300 * TOKEN_BYTES
        assert found["tier_written_bytes_total", "disk"] > 3 * 300 * TOKEN_BYTES
        assert found["tier_read_bytes_total", "disk"] > 300 * TOKEN_BYTES
        assert found["tier_evictions_total", "memory"] > 0
        assert found["tier_up", "disk"] == 1
        assert ("tier_read_bytes_total", "memory") not in found
        assert found["bad_objects_total", None] == 0, "counters are there before the first event"
        assert not connector(llm).hook_errors
