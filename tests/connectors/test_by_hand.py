"""Which tokens of a request hand-written KV serves, and what is remembered of requests that ended."""

from types import SimpleNamespace

import pytest
import torch

import kvlab
from kvlab.chunking import Chunker
from kvlab.connectors.captured import KV
from kvlab.connectors.vllm.by_hand.history import History
from kvlab.connectors.vllm.by_hand.written import ByHand
from kvlab.connectors.vllm.scheduler.hints import Hints
from kvlab.errors import ConfigError
from kvlab.simulation.trace_files import load_traffic, save_traffic


def request_of(salt, tokens, num_generated=0):
    return SimpleNamespace(
        cache_salt=salt,
        prompt_token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        num_tokens=len(tokens) + num_generated,
        sampling_params=SimpleNamespace(prompt_logprobs=None, extra_args=None),
        pooling_params=None,
        skip_reading_prefix_cache=False,
    )


def test_the_prompts_last_token_is_computed_also_after_a_preemption():
    half = (torch.zeros(5, 1, 2),)
    by_hand = ByHand(None)
    salt = by_hand.add(KV(half, half, tuple(range(5)), 5, "", (None,)))
    assert by_hand.match(request_of(salt, range(5)), 0) == 4
    assert by_hand.match(request_of(salt, range(5), num_generated=3), 0) == 4
    assert by_hand.match(request_of(salt, range(9)), 2) == 3
    assert by_hand.match(request_of(salt, [7, *range(1, 5)]), 0) == 0


TOKENS = list(range(64))
SAME = "Request 0 begins with the same 64 tokens"


class Engine:
    """As much of an engine as a history asks: blocks of 16 tokens, a memory of 1,000."""

    def __init__(self):
        self.history, self.states = History(), {}
        config = {
            "policy": "lru",
            "save_partial_block": False,
            "store_threshold": 1,
            "store_rule": "",
            "secondary_tiers": (),
        }
        lossless = SimpleNamespace(is_lossy=False, slots_are_exact=True)
        scheduler = SimpleNamespace(state_of=self.states.get, config=lossless, may_load=True, may_save=True, tiers=None)
        self.connector = SimpleNamespace(
            chunker=Chunker(16, 16), num_slots=1000, config=SimpleNamespace(**config), scheduler=scheduler
        )

    def ends(self, tokens, extras=(), *, given_up=False, prompt_logprobs=None, aborted=False, **hints):
        number = len(self.history.ended)
        extras = {0: list(extras)} if extras else {}
        params = {"kv_transfer_params": {"kvlab": hints}} if hints else {}
        request = request_of(None, tokens)
        request.__dict__.update(
            params, request_id=number, arrival_time=float(number), num_output_tokens=0 if aborted else 4
        )
        request.status = SimpleNamespace(name="FINISHED_ABORTED" if aborted else "FINISHED_STOPPED")
        request.sampling_params.prompt_logprobs = prompt_logprobs
        self.states[number] = SimpleNamespace(extras=extras, hints=Hints.of(request), given_up=given_up)
        self.history.add(request, self.connector.scheduler)

    def why(self, request=-1, prefix_cache=False):
        return self.history.why(request, self.connector, prefix_cache)


@pytest.mark.parametrize(
    ("before", "asked", "reason", "line"),
    [
        ([{}], {}, "hit", None),
        (
            [{}],
            {"extras": [("cache_salt", "bob's")]},
            "other_salt",
            f"{SAME}, with another cache_salt.",
        ),
        ([{"extras": [("cache_salt", "bob's")]}] * 2, {"extras": [("cache_salt", "bob's")]}, "hit", None),
        (
            [{}],
            {"extras": [("lora", "a")]},
            "other_adapter",
            f"{SAME}, with another LoRA adapter.",
        ),
        ([{"extras": [("mm", "a@0")]}], {"extras": [("mm", "b@0")]}, "other_media", None),
        ([{"extras": [("lora", "a")]}], {"extras": [("cache_salt", "x")]}, "other_namespace", None),
        (
            [{"save": False}],
            {},
            "not_saved",
            f"{SAME}, and was not saved: hint save=false.",
        ),
        ([{"given_up": True}], {}, "not_saved", None),
        (
            [{"aborted": True}],
            {},
            "not_saved",
            f"{SAME}, and was not saved: it was aborted, and what was kept is not known.",
        ),
        ([{}], {"load": False}, "not_loaded", "Nothing was loaded for it: hint load=false."),
        ([{}], {"zz": 1}, "not_loaded", None),
        ([{}], {"prompt_logprobs": 1}, "not_loaded", None),
        ([{}, "reset"], {}, "reset", f"{SAME}, and the cache was reset since."),
        ([{}, "reset", {}], {}, "hit", None),
        ([{}, {"extras": [("cache_salt", "bob's")]}, "reset"], {}, "reset", None),
    ],
)
def test_the_page_of_an_engines_request_tells_what_the_engine_goes_by(before, asked, reason, line):
    engine = Engine()
    for each in before:
        if each == "reset":
            engine.history.resets += 1
        else:
            engine.ends(TOKENS, **each)
    engine.ends(TOKENS, **asked)
    page = engine.why()
    assert page.reason == reason
    assert (page.hit_tokens == 64) == (reason == "hit")
    assert line is None or line in page.lines()
    assert "bob" not in repr(page)
    hits = kvlab.simulate(engine.history.traffic(16), "1000 blocks", chunk_tokens=16, connector=True).hit_tokens
    assert hits[-1] == page.hit_tokens


def test_a_page_behind_a_reset_names_requests_by_their_place_in_the_history():
    engine = Engine()
    engine.ends([9] * 64)
    engine.history.resets += 1
    engine.ends(TOKENS)
    engine.ends([*TOKENS[:40], *[7] * 24])
    page = engine.why()
    assert (page.request, page.reason, page.difference.nearest, page.difference.token) == (2, "differs", 1, 40)
    assert engine.why(0).reason == "first"


def test_a_page_says_what_the_replay_does_not_know():
    engine = Engine()
    engine.ends([1, 2, 3])
    with pytest.raises(ConfigError, match="kept it as a partial block, which serves the very same prompt"):
        engine.why()
    with pytest.raises(ConfigError, match="a place in a history of 1, got 1"):
        engine.why(1)
    engine.connector.config.save_partial_block = True
    engine.connector.config.store_threshold = 2
    engine.connector.scheduler.tiers = object()
    engine.ends([*TOKENS, 1, 2])
    assert engine.why(prefix_cache=True).lines()[-1] == (
        "Not in the replay: last blocks that prompts fill in part, secondary tiers, vLLM's prefix cache, what is not "
        "saved by store_threshold and store_rule."
    )


def test_a_recorded_trace_keeps_apart_what_the_engine_does_and_names_no_salt(tmp_path):
    engine = Engine()
    for asked in ({}, {"extras": [("cache_salt", "bob's")]}, {"save": False}, {"load": False}, {}):
        engine.ends(TOKENS, **asked)
    engine.history.resets += 1
    engine.ends(TOKENS)
    save_traffic(engine.history.traffic(16), tmp_path / "trace.jsonl")
    assert "bob" not in (tmp_path / "trace.jsonl").read_text()
    for trace in (engine.history.traffic(16), load_traffic(tmp_path / "trace.jsonl", block_tokens=16)):
        run = kvlab.simulate(trace, "1000 blocks", chunk_tokens=16, connector=True)
        assert run.hit_tokens.tolist() == [0, 0, 64, 0, 64, 0]
