"""Weights, and what vLLM derives from its options: KV that other ones computed is never served, nor stored under a
name that is not its own."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from kvlab.connectors.vllm_plugin import FILES_BEFORE_LOAD
from kvlab.errors import ConfigError
from kvlab.judge.engine import core
from tests.connectors.engine import connector, drain, empty_memory, engine, generate, prompt
from tests.connectors.stress import tiny_model

PROMPT, NEW = prompt(300), prompt(480, ending=0)


def change(model) -> None:
    """As a trainer's update would. (On a CPU the linear layers run from packed copies, so the norms.)"""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "layernorm" in name:
                weights.mul_((1 + 0.5 * torch.randn(weights.shape, generator=rng)).to(weights.device))


@pytest.fixture(scope="module")
def changed():
    """What the changed model answers without a cache."""
    with engine(None) as llm:
        llm.apply_model(change)
        return {tuple(p): generate(llm, [p])[0].tokens for p in (PROMPT, NEW)}


def in_turn(llm) -> list[tuple[int, list[int]]]:
    """Hit and tokens of both prompts. One waits until the other is stored: asked together, the second one's lookup
    may or may not find what the first is saving."""
    answers = []
    for p in (PROMPT, NEW):
        answers += generate(llm, [p])
        drain(llm)
    return [(answer.hit, answer.tokens) for answer in answers]


@pytest.mark.parametrize("memory", [True, False], ids=["memory-and-disk", "disk"])
def test_a_reset_after_an_update_reaches_every_tier(tmp_path, expected, changed, memory):
    tiers = ["memory://?size=256MiB"] * memory + [f"file://{tmp_path}?size=1GiB"]
    with engine(tiers) as llm:
        assert generate(llm, [PROMPT])[0].tokens == expected(PROMPT)
        drain(llm)
        llm.apply_model(change)
        assert llm.reset_prefix_cache(reset_connector=True) is True
        for hits in ([0, 288], [299, 479]):  # of the new prompt at first what it shares, computed just before
            assert in_turn(llm) == [(hit, changed[tuple(p)]) for hit, p in zip(hits, (PROMPT, NEW), strict=True)]
        waits_for_a_load(llm)
        assert llm.reset_prefix_cache(reset_connector=True) is False, "this request will use what was stored before"
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert llm.reset_prefix_cache(reset_connector=True) is True
        assert not connector(llm).hook_errors
    with engine(tiers) as llm:  # with the folder's weights again
        assert in_turn(llm) == [(299, expected(PROMPT)), (288, expected(NEW))], "of the new prompt what both share"


def waits_for_a_load(llm):
    from vllm import SamplingParams

    vllm, sampling = llm.llm_engine, SamplingParams(temperature=0, max_tokens=2)
    while not connector(llm).scheduler.unbegun:
        if not vllm.has_unfinished_requests():
            empty_memory(llm)
            vllm.add_request("waits", {"prompt_token_ids": PROMPT}, sampling)
        vllm.step()


def test_requests_that_run_through_a_reset_are_not_stored(tmp_path, changed):
    """They began with the old weights: their KV is of both."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    tiers = ["memory://?size=256MiB", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}) as llm:
        vllm = llm.llm_engine
        vllm.add_request("runs", {"prompt_token_ids": PROMPT}, sampling)
        while not any(request.num_computed_tokens for request in core(llm).running):
            vllm.step()  # it waits for the tier's answer first
        llm.apply_model(change)
        connector(llm).reset_cache()  # vLLM itself refuses to while requests run, or makes them begin again
        while vllm.has_unfinished_requests():
            vllm.step()
        drain(llm)
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (0, changed[tuple(PROMPT)])
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (299, changed[tuple(PROMPT)])


def test_a_reset_that_fails_says_so_and_turns_the_cache_off(expected, monkeypatch):
    with engine(["memory://?size=256MiB"]) as llm:
        generate(llm, [PROMPT])
        monkeypatch.setattr(connector(llm).scheduler.index, "clear", lambda: 1 / 0)
        assert llm.reset_prefix_cache(reset_connector=True) is False
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (0, expected(PROMPT))


def load_norms(model) -> None:
    """As trainers do that send tensors to `load_weights`."""
    before = {name: weights.detach().clone() for name, weights in model.named_parameters() if "layernorm" in name}
    change(model)
    changed = {name: dict(model.named_parameters())[name].detach().clone() for name in before}
    with torch.no_grad():
        for name, weights in before.items():
            dict(model.named_parameters())[name].copy_(weights)
    model.load_weights(iter(changed.items()))


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["", "prefix-caching"])
def test_weights_that_come_without_a_reset_turn_the_cache_off(tmp_path, expected, changed, prefix_caching):
    """Until the reset: nothing of the old weights is served, and nothing of the new ones stored as theirs."""
    tiers = ["memory://?size=256MiB", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, {"enable_prefix_caching": prefix_caching}) as llm:
        assert generate(llm, [PROMPT])[0].tokens == expected(PROMPT)
        drain(llm)
        llm.apply_model(load_norms)
        if not prefix_caching:  # vLLM's own would serve what the old weights computed
            for _ in range(2):
                answer = generate(llm, [PROMPT])[0]
                assert (answer.hit, answer.tokens) == (0, changed[tuple(PROMPT)])
        generate(llm, [NEW])
        assert connector(llm).scheduler.counters["weights_changed"] == 1
        assert connector(llm).scheduler.enabled is False
        drain(llm)
        assert llm.reset_prefix_cache(reset_connector=True) is True
        for hits in ([0, 288], [299, 479]):
            answers = in_turn(llm)
            assert [tokens for _, tokens in answers] == [changed[tuple(PROMPT)], changed[tuple(NEW)]]
            assert prefix_caching or [hit for hit, _ in answers] == hits
    with engine(tiers) as llm:  # with the folder's weights again
        answers = generate(llm, [PROMPT, NEW])
        assert [answer.tokens for answer in answers] == [expected(PROMPT), expected(NEW)]


def test_weights_that_come_between_a_reset_and_the_next_request_are_those_of_its_version(tmp_path, changed):
    """As in an engine that sleeps, which resets, and gets its weights while it wakes up."""
    with engine(["memory://?size=256MiB", f"file://{tmp_path}?size=1GiB"]) as llm:
        generate(llm, [PROMPT])
        assert llm.reset_prefix_cache(reset_connector=True) is True
        llm.apply_model(load_norms)
        for hit in (0, 299):
            answer = generate(llm, [PROMPT])[0]
            assert (answer.hit, answer.tokens) == (hit, changed[tuple(PROMPT)])
            drain(llm)
        assert connector(llm).scheduler.enabled is True


def test_weights_that_are_read_again_by_the_worker_are_others(tmp_path, expected):
    with engine(["memory://?size=256MiB"]) as llm:
        generate(llm, [PROMPT])
        llm.collective_rpc("reload_weights")
        answer = generate(llm, [PROMPT])[0]
        assert (answer.hit, answer.tokens) == (0, expected(PROMPT))
        assert llm.reset_prefix_cache(reset_connector=True) is True
        assert [generate(llm, [PROMPT])[0].hit for _ in range(2)] == [0, 299]


def test_pages_that_outlive_a_reset_are_not_stored_as_the_new_weights(tmp_path, changed):
    """vLLM keeps its prefix cache while a request runs, and answers False; the connector has a new version then."""
    from vllm import SamplingParams

    tiers = ["memory://?size=256MiB", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, {"enable_prefix_caching": True}) as llm:
        vllm = llm.llm_engine
        vllm.add_request("runs", {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=60, ignore_eos=True))
        while not any(answer.outputs[0].token_ids for answer in vllm.step()):
            pass  # it waits for the tier's answer
        assert llm.reset_prefix_cache(reset_connector=True) is False
        llm.apply_model(load_norms)
        vllm.add_request("finds pages", {"prompt_token_ids": NEW}, SamplingParams(max_tokens=2))
        while vllm.has_unfinished_requests():
            vllm.step()
        drain(llm)
        assert llm.reset_prefix_cache() is True, "vLLM's own alone"
        answers = generate(llm, [PROMPT, NEW])
        assert [answer.tokens for answer in answers] == [changed[tuple(PROMPT)], changed[tuple(NEW)]]
        assert not connector(llm).hook_errors


def longrope(max_model_len: int) -> dict:
    """vLLM takes the long factors where the engine may go beyond 512 tokens, for all prompts."""
    rope = {
        "rope_type": "longrope", "rope_theta": 100000.0, "original_max_position_embeddings": 512,
        "short_factor": [1.0] * 32, "long_factor": [1.0 + at / 2 for at in range(32)],
    }  # fmt: skip
    overrides = {"rope_parameters": rope, "max_position_embeddings": 2048}
    return {"hf_overrides": overrides, "max_model_len": max_model_len}


def test_longrope_with_another_longest_prompt_is_another_model(tmp_path):
    tiers = ["memory://?size=64MiB", f"file://{tmp_path}?size=1GiB"]
    with engine(None, longrope(1024)) as llm:
        right = generate(llm, [NEW])[0].tokens
    with engine(tiers, longrope(512)) as llm:
        assert generate(llm, [NEW])[0].tokens != right, "factors that change nothing would prove nothing"
        drain(llm)
    for hit in (0, 479):
        with engine(tiers, longrope(1024)) as llm:
            answer = generate(llm, [NEW])[0]
            assert (answer.hit, answer.tokens) == (hit, right)
            drain(llm)


@pytest.mark.parametrize("plugin", [True, False], ids=["seen by the plugin", "by the time of change alone"])
def test_weights_replaced_while_they_load_stop_the_start(tmp_path, monkeypatch, plugin):
    """Their name would be that of the new files, their KV that of the old ones."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    model = Path(tiny_model(tmp_path / "model", "llama"))
    settings = {"model": str(model), "skip_tokenizer_init": True, "max_model_len": 448}
    tiers = ["memory://?size=64MiB", f"file://{tmp_path}/tier?size=1GiB"]
    load_weights = DefaultModelLoader.load_weights

    def load_and_replace(*args, **kwargs):
        load_weights(*args, **kwargs)
        weights = model / "model.safetensors"
        shutil.copy(weights, tmp_path / "new")
        os.replace(tmp_path / "new", weights)
        if not plugin:
            FILES_BEFORE_LOAD.clear()

    with engine(tiers, settings):
        pass
    monkeypatch.setattr(DefaultModelLoader, "load_weights", load_and_replace)
    with pytest.raises(ConfigError, match="changed while the engine loaded them"), engine(tiers, settings):
        pass
