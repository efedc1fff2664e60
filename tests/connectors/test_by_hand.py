"""Which tokens of a request hand-written KV serves, and what is remembered of requests that ended."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kvlab
from kvlab.chunking import Chunker
from kvlab.connectors.captured import KV
from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm.by_hand.history import MOST_REMEMBERED, SKIPPED, History
from kvlab.connectors.vllm.by_hand.left_out import LEFT_OUT, rules_of
from kvlab.connectors.vllm.by_hand.written import ByHand
from kvlab.connectors.vllm.scheduler.hints import Hints
from kvlab.connectors.vllm.scheduler.hits import end_block, find_hit
from kvlab.connectors.vllm.scheduler.misses import miss_reason
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.errors import ConfigError
from kvlab.simulation.trace_files import load_traffic, save_traffic
from tests.support.asked import agree, random_requests


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
AFTER_ALL = 1e11  # seconds: each prompt came when the one before had ended
SAME = "Request 0 begins with the same 64 tokens"


class Engine:
    """As much of an engine as a history asks: blocks of 16 tokens, a memory of 1,000."""

    def __init__(self, num_slots=1000, chunk_tokens=16, **settings):
        self.history, self.states = History(), {}
        config = ConnectorConfig.from_extra({"tiers": ["memory://?size=1GiB"], **settings})
        scheduler = SimpleNamespace(
            state_of=self.states.get,
            config=config,
            may_load=True,
            may_save=True,
            tiers=None,
            keeps_partial_block=config.save_partial_block,
        )
        groups = SimpleNamespace(have_windows=False, recurrent=())
        self.connector = SimpleNamespace(
            chunker=Chunker(chunk_tokens, 16), num_slots=num_slots, config=config, scheduler=scheduler, groups=groups
        )

    def ends(self, tokens, extras=(), *, given_up=False, prompt_logprobs=None, aborted=False, row=None, **hints):
        number = len(self.history.ended)
        extras = {0: list(extras)} if extras else {}
        params = {"kv_transfer_params": {"kvlab": hints}} if hints else {}
        request = request_of(None, tokens)
        request.__dict__.update(
            params,
            request_id=number,
            arrival_time=AFTER_ALL + number,
            num_output_tokens=0 if aborted else 4,
        )
        request.status = SimpleNamespace(name="FINISHED_ABORTED" if aborted else "FINISHED_STOPPED")
        request.sampling_params.prompt_logprobs = prompt_logprobs
        self.states[number] = SimpleNamespace(extras=extras, hints=Hints.of(request), given_up=given_up, row=row or {})
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


def uses(what, engine):
    """Have `engine` use what no replay knows, by its words in `LEFT_OUT`."""
    connector = engine.connector
    if what == "what was kept before the cache was attached":
        engine.history.began_empty = False
    elif what == "prompts before the latest 10,000":
        for _ in range(MOST_REMEMBERED):
            engine.ends([9] * 16)
    elif what == "last blocks that prompts fill in part":
        engine.ends([*TOKENS, 1, 2])
    elif what == "secondary tiers":
        connector.scheduler.tiers = object()
    elif what == "pins":
        engine.ends(TOKENS, pin=True)
    elif what == "max_salt_share":
        engine.ends(TOKENS, [("cache_salt", "bob's")])
    elif what == "loads that admission did not make":
        engine.ends(TOKENS, row={"miss": "not_worth_loading"})
    elif what == "hits that quality_check computed":
        engine.ends(TOKENS, row={"miss": "quality_check"})
    elif what == "layers with a sliding window":
        connector.groups.have_windows = True
    elif what == "recurrent states":
        connector.groups.recurrent = (1,)
    elif what == "prompts under way at the same time":
        engine.ends(TOKENS)
        engine.history.ended[-1] = engine.history.ended[-1]._replace(ended_s=2 * AFTER_ALL)


SETTINGS = {
    "generated tokens (save_generated)": {"save_generated": True},
    "max_salt_share": {"max_salt_share": 0.25},
    "what is not saved by store_threshold and store_rule": {"store_threshold": 2},
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_a_page_names_what_is_in_use_and_not_in_the_replay(what):
    engine = Engine(**SETTINGS.get(what, {}))
    engine.ends(TOKENS)
    assert not any("Not in the replay" in line for line in engine.why(0).lines()) or what in SETTINGS
    uses(what, engine)
    engine.ends(TOKENS)
    line = f"Not in the replay: {what}."
    assert line in engine.why(prefix_cache=what == "vLLM's prefix cache").lines()


def test_the_guide_lists_what_a_page_names():
    text = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "edit.md").read_text()
    listed = text.partition("It does not know: ")[2].partition(".\n")[0].split("; ")
    assert [words.replace("`", "") for words in listed] == list(LEFT_OUT)


def test_each_setting_of_the_connector_is_in_the_replay_or_named_on_a_page_or_changes_no_hit():
    in_replay = {"tiers", "chunk_tokens", "save_partial_block", "min_hit_tokens", "enabled"}
    of_secondary_tiers = {"staging", "lookup_timeout_ms", "load_timeout_ms"}
    changes_none = {"gpu_staging", "report", "namespace", "transform"}
    named = {"admission", "save_generated", "store_threshold", "store_rule", "max_salt_share", "max_pinned_share"}
    named |= {"quality_check"}
    settings = {field.name for field in dataclasses.fields(ConnectorConfig) if field.init}
    assert settings == in_replay | of_secondary_tiers | changes_none | named
    words = " ".join(LEFT_OUT).replace("pins", "max_pinned_share")
    assert all(name in words for name in named)


def test_a_page_says_where_the_engine_did_otherwise_than_the_replay():
    engine = Engine()
    engine.ends(TOKENS)
    engine.ends(TOKENS, row={"hit_tokens": 63})
    assert not any("The engine itself" in line for line in engine.why().lines())
    engine.ends(TOKENS, row={"hit_tokens": 32})
    assert not any("The engine itself" in line for line in engine.why(prefix_cache=True).lines())
    assert "The engine itself loaded 32 tokens." in engine.why().lines()


@pytest.mark.parametrize(
    ("settings", "asked", "hit", "reason", "line"),
    [
        ({"save_partial_block": False}, TOKENS, 48, "hit", "48 tokens can be served: whole blocks before"),
        ({"save_partial_block": False}, [*TOKENS, 7], 64, "hit", None),
        ({"min_hit_tokens": 63}, TOKENS, 64, "hit", None),
        ({"min_hit_tokens": 64}, TOKENS, 0, "too_short", "64 tokens were held, too few to be loaded: min_hit_tokens."),
        ({"min_hit_tokens": 49, "save_partial_block": False}, TOKENS, 0, "too_short", "48 tokens were held"),
        ({"min_hit_tokens": 33}, [*TOKENS[:32], *[7] * 32], 0, "too_short", "32 tokens were held"),
        ({"min_hit_tokens": 33}, [7] * 64, 0, "first", None),
    ],
)
def test_the_replay_serves_as_much_of_a_prompt_as_the_engine(settings, asked, hit, reason, line):
    engine = Engine(**settings)
    engine.ends(TOKENS)
    engine.ends(asked)
    page = engine.why()
    assert (page.hit_tokens, page.reason) == (hit, reason)
    assert line is None or any(each.startswith(line) for each in page.lines())
    rules = rules_of(engine.connector)
    run = kvlab.simulate(engine.history.traffic(16), "1000 blocks", chunk_tokens=16, connector=rules)
    assert run.hit_tokens[-1] == hit
    assert {name: run.row[name] for name in settings} == settings


@pytest.mark.parametrize("reason", SKIPPED)
def test_a_page_gives_the_engines_own_reason_where_it_did_not_load_what_it_could_have(reason):
    engine = Engine()
    engine.ends(TOKENS)
    engine.ends(TOKENS, row={"miss": reason})
    assert engine.why().reason == reason


BOBS = {"extras": [("cache_salt", "bob's")]}


@pytest.mark.parametrize("other", [BOBS, {"save": False}, "reset"])
def test_what_was_evicted_is_told_before_what_others_had_more_of(other):
    """An own prompt of 32 tokens is driven out; another's has all 64."""
    engine = Engine(num_slots=4)
    if other == "reset":
        engine.ends(TOKENS)
        engine.history.resets += 1
    engine.ends(TOKENS[:32])
    if other != "reset":
        engine.ends(TOKENS, **other)
    engine.ends([9] * 64)
    engine.ends(TOKENS)
    page = engine.why()
    assert (page.reason, page.eviction.block) == ("evicted", 0)


@pytest.mark.parametrize(
    ("bobs", "reason", "hit"),
    [
        (96, "differs", 0),  # of a prompt that goes on elsewhere, within the chunk
        (128, "other_salt", 128),
        (200, "other_salt", 128),
        (255, "other_salt", 128),
    ],
)
def test_another_prompt_could_serve_whole_chunks_alone(bobs, reason, hit):
    long = list(range(1000, 1300))
    engine = Engine(chunk_tokens=128)
    engine.ends([*long[:80], *[5] * 220])
    engine.ends([*long[:bobs], *[7] * 100], **BOBS)
    engine.ends(long)
    page = engine.why()
    assert page.reason == reason
    assert any(f"begins with the same {hit} tokens" in line for line in page.lines()) == bool(hit)


def test_another_prompt_could_serve_its_tail_where_all_of_it_is_shared():
    long = list(range(1000, 1300))
    engine = Engine(chunk_tokens=128)
    engine.ends(long[:200], **BOBS)
    engine.ends(long)
    assert "Request 0 begins with the same 192 tokens, with another cache_salt." in engine.why().lines()


class Serving(Engine):
    """An engine's memory tier, as its scheduler uses it: an index, the hit, and the reason of a miss."""

    def __init__(self, num_slots, chunk_tokens):
        super().__init__(num_slots, chunk_tokens)
        self.index = SlotIndex(num_slots)
        self.residency = Residency(self.index, keeps_memory=True)

    def reset(self):
        self.history.resets += 1
        self.index.clear()

    def serve(self, tokens, extras=(), **hints):
        """Tokens of the hit, and the row's reason."""
        chunker, request = self.connector.chunker, request_of(None, tokens)
        request.all_token_ids = request.prompt_token_ids
        named = {0: list(extras)} if extras else {}
        state = RequestState(request, named, hints=Hints(**hints), keeps_partial_block=False)
        hashes = state.extend_hashes(chunker)
        plan = find_hit(state, chunker, self.residency, {}) if state.hints.load else []
        reason = miss_reason(state, plan, chunker, self.residency, lossy=False, asks=False)
        self.index.touch(ref.hash for ref in reversed(plan))
        if state.hints.save and end_block(plan) < len(hashes):
            spans = chunker.spans(len(tokens))
            for span in spans:
                if self.index.get(hashes[span.end_block - 1]) is None:
                    self.index.reserve(hashes[span.end_block - 1], span.num_blocks)
            self.index.touch(hashes[span.end_block - 1] for span in reversed(spans))
        self.ends(tokens, extras, **hints)
        return end_block(plan) * chunker.block_tokens, reason


@pytest.mark.parametrize("chunk_tokens", [16, 32, 64])
def test_the_reason_of_a_page_is_that_of_the_engines_row(chunk_tokens):
    reasons = Counter()
    for seed in range(4):
        engine = Serving(24, chunk_tokens)
        for asked in random_requests(seed, 70, 144):
            if asked is None:
                engine.reset()
                continue
            tokens, salted, hints = asked
            hit, row = engine.serve(tokens, BOBS["extras"] if salted else (), **hints)
            page = engine.why()
            reasons[page.reason] += 1
            assert page.hit_tokens == hit
            assert agree(page, row, 16), (page, row)
    assert {"hit", "evicted", "differs", "other_salt", "not_saved", "not_loaded", "reset", "first"} <= set(reasons)


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
