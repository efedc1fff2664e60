"""LoRA adapters and images: what changes KV besides the tokens is in the key."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvlab.connectors.vllm import adapters
from kvlab.connectors.vllm.adapters import Adapters, LoadedAdapter
from kvlab.connectors.vllm.messages import WorkerReport
from kvlab.connectors.vllm.scheduler.requests import request_extras
from tests.connectors.engine import MAX_TOKENS, Answer, connector, drain, engine, prompt
from tests.connectors.models import KEPT
from tests.support.tiers import cache_server

RANK, HIDDEN, LAYERS = 8, 576, len(KEPT)


def adapter(folder: Path, seed: int) -> str:
    """A LoRA adapter with random weights for the queries and values of every layer of the demo model."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", 576), ("v_proj", 192)):
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{base}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=rng) * 0.05
            tensors[f"{base}.lora_B.weight"] = torch.randn(width, RANK, generator=rng) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


SETTINGS = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}


def ask(llm, adapter_id: int | None, path: str = "", name: str = "", **lora_options) -> Answer:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = LoRARequest(name, adapter_id, path, **lora_options) if adapter_id is not None else None
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt(300)}]
    (output,) = llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)
    return Answer(list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get("kvlab", {}))


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[int, list[int]]:
    """What adapters 1 to 3 answer without a cache."""
    folder = tmp_path_factory.mktemp("adapters")
    with engine(None, SETTINGS) as llm:
        found = {seed: ask(llm, seed, adapter(folder / str(seed), seed), str(seed)).tokens for seed in (1, 2, 3)}
    assert len({tuple(tokens) for tokens in found.values()}) == 3, "adapters that change nothing would prove nothing"
    return found


def test_adapters_do_not_share(tmp_path, expected, answers):
    """Nor in the memory of a cache server: another engine, which names them otherwise, is lent each its own."""
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    asked = [(None, "", ""), (1, one, "x"), (2, two, "y")]
    with cache_server(tmp_path / "kvlab.sock", "256MiB") as server:
        tiers = [f"kvlab://{server.path}"]
        adapters_do_not_share(["memory://?size=256MiB", *tiers], asked, expected, answers)
        with engine(tiers, SETTINGS) as llm:
            turns = [[ask(llm, *each) for each in [(None, "", ""), (7, two, "x"), (8, one, "y")]] for _ in range(2)]
            assert [[answer.hit for answer in turn] for turn in turns] == [[299, 0, 0], [299, 299, 299]]
            for turn in turns:
                assert [answer.tokens for answer in turn] == [expected(prompt(300)), answers[2], answers[1]]
            assert {answer.row["tier"] for answer in turns[1]} == {"serve:memory"}
            assert not connector(llm).hook_errors


def adapters_do_not_share(tiers, asked, expected, answers):
    with engine(tiers, SETTINGS) as llm:
        turns = [[ask(llm, *each) for each in asked] for _ in range(3)]
        # An adapter is known once it is loaded, which its first request does: that one goes without the cache.
        assert [[answer.hit for answer in turn] for turn in turns] == [[0, 0, 0], [299, 0, 0], [299, 299, 299]]
        for turn in turns:
            assert [answer.tokens for answer in turn] == [expected(prompt(300)), answers[1], answers[2]]
        drain(llm)
        assert not connector(llm).hook_errors


def test_an_adapter_that_is_loaded_before_its_first_request_is_cached_from_there_on(tmp_path, answers):
    from vllm.lora.request import LoRARequest

    one = adapter(tmp_path / "one", 1)
    for hit in (0, 299):
        with engine(["memory://?size=256MiB", f"file://{tmp_path}/kv?size=1GiB"], SETTINGS) as llm:
            llm.llm_engine.add_lora(LoRARequest("x", 1, one))
            answer = ask(llm, 1, one, "x")
            assert (answer.hit, answer.tokens) == (hit, answers[1])
            drain(llm)


def test_files_replaced_under_a_loaded_adapter(tmp_path, answers, monkeypatch):
    """The engine goes on with the weights it loaded: they are stored under no other's name, and told of once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter(tmp_path / "tuned", 1)
    tiers = ["memory://?size=256MiB", f"file://{tmp_path}/kv?size=1GiB"]
    path = "~/tuned"
    told: list[str] = []
    monkeypatch.setattr(adapters.logger, "warning", lambda message, *values: told.append(message % values))
    with engine(tiers, SETTINGS) as llm:
        assert [ask(llm, 1, path, "x").hit for _ in range(3)] == [0, 0, 299]
        adapter(tmp_path / "tuned", 2)
        for _ in range(2):
            answer = ask(llm, 1, path, "x")
            assert (answer.hit, answer.tokens) == (0, answers[1])
        assert len(told) == 1
        assert "changed since they were loaded" in told[0]
        drain(llm)
    with engine(tiers, SETTINGS) as llm:
        for hit in (0, 0, 299):
            answer = ask(llm, 1, path, "x")
            assert (answer.hit, answer.tokens) == (hit, answers[2])
        assert not connector(llm).hook_errors


def test_an_adapter_loaded_again_in_place(tmp_path, answers):
    """A trainer writes the folder, then reloads: what was stored with the old weights is not found any more."""
    from vllm.lora.request import LoRARequest

    path = adapter(tmp_path / "tuned", 1)
    tiers = ["memory://?size=256MiB", f"file://{tmp_path}/kv?size=1GiB"]
    with engine(tiers, SETTINGS) as llm:
        assert [ask(llm, 1, path, "x").hit for _ in range(3)] == [0, 0, 299]
        for seed in (2, 3):
            adapter(tmp_path / "tuned", seed)
            llm.llm_engine.add_lora(LoRARequest("x", 1, path, load_inplace=True))
            for hit in (0, 299):
                answer = ask(llm, 1, path, "x")
                assert (answer.hit, answer.tokens) == (hit, answers[seed])
        adapter(tmp_path / "tuned", 1)
        llm.llm_engine.add_lora(LoRARequest("x", 1, path, load_inplace=True))
        answer = ask(llm, 1, path, "x")
        assert (answer.hit, answer.tokens) == (299, answers[1]), "the first weights again, and their KV"
        drain(llm)
    adapter(tmp_path / "tuned", 3)
    with engine(tiers, SETTINGS) as llm:
        assert [ask(llm, 1, path, "x").tokens for _ in range(3)] == [answers[3]] * 3
        assert not connector(llm).hook_errors


def test_what_the_prefix_cache_holds_under_an_adapters_name_may_be_anothers(tmp_path, answers):
    """vLLM's own prefix cache knows adapters by name and path: after a reload it finds KV of the first weights, and so
    answers; under the second weights' name that is not stored."""
    from vllm.lora.request import LoRARequest

    path = adapter(tmp_path / "tuned", 1)
    tiers = ["memory://?size=256MiB", f"file://{tmp_path}/kv?size=1GiB"]
    with engine(tiers, {**SETTINGS, "enable_prefix_caching": True}) as llm:
        llm.llm_engine.add_lora(LoRARequest("x", 1, path))
        ask(llm, 1, path, "x")
        adapter(tmp_path / "tuned", 2)
        llm.llm_engine.add_lora(LoRARequest("x", 1, path, load_inplace=True))
        ask(llm, 1, path, "x")
        drain(llm)
    with engine(tiers, SETTINGS) as llm:
        llm.llm_engine.add_lora(LoRARequest("x", 1, path))
        assert ask(llm, 1, path, "x").tokens == answers[2]


def test_options_of_lora_are_part_of_the_name(tmp_path):
    path = adapter(tmp_path / "tuned", 1)
    tiers = [f"file://{tmp_path}/kv?size=1GiB"]
    with engine(tiers, SETTINGS) as llm:
        assert [ask(llm, 1, path, "x").hit for _ in range(2)] == [0, 0]
        drain(llm)
    restricted = {**SETTINGS, "lora_target_modules": ["o_proj"]}
    with engine(tiers, restricted) as llm:
        assert [ask(llm, 1, path, "x").hit for _ in range(2)] == [0, 0]


def test_one_name_of_two_contents(tmp_path):
    watched = Adapters()
    for adapter_id, seed in ((1, 1), (2, 2)):
        path = adapter(tmp_path / str(seed), seed)
        watched.loading(lambda: None, adapter_id, path, path, "float32", "x")
        assert watched.is_only_one_called("x") is (adapter_id == 1)
    assert not watched.is_only_one_called("never loaded")


def test_equal_sizes_and_times_hide_no_change(tmp_path):
    """Archives and image layers set times."""
    watched = Adapters()

    def load(seed):
        adapter(tmp_path / "tuned", seed)
        for file in (tmp_path / "tuned").iterdir():
            os.utime(file, (1, 1))
        watched.loading(lambda: None, 1, "tuned", str(tmp_path / "tuned"), "float32")
        return watched.nameable(1, "tuned")

    first, second, third = load(1), load(2), load(1)
    assert first.digest == third.digest != second.digest
    assert (first.num_loads, second.num_loads, third.num_loads) == (1, 2, 3)
    assert watched.nameable(1, "another path") is None
    assert watched.nameable(2, "tuned") is None
    watched.clear()
    assert watched.nameable(1, "tuned") is None


def test_an_adapter_written_while_it_is_loaded_is_not_known(tmp_path):
    watched = Adapters()
    path = adapter(tmp_path / "tuned", 1)
    watched.loading(lambda: adapter(tmp_path / "tuned", 2), 1, path, path, "float32")
    assert watched.nameable(1, path) is None
    watched.loading(lambda: None, 2, "org/name", None, "float32")  # no folder
    assert watched.nameable(2, "org/name") is None


def test_ranks_that_loaded_different_weights_are_not_believed():
    one = LoadedAdapter("x", "a", "p", "p", (), 1)
    report, other = (
        WorkerReport(adapters={1: one, 2: one}),
        WorkerReport(adapters={1: replace(one, digest="b"), 2: one}),
    )
    report.aggregate(other)
    assert (report.adapters[1].digest, report.adapters[2].digest) == (None, "a")


def feature(offset: int) -> SimpleNamespace:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset))


@pytest.mark.parametrize(
    ("request_fields", "extras"),
    [
        ({}, {}),
        ({"cache_salt": "s"}, {0: [("cache_salt", "s")]}),
        ({"mm_features": [feature(5), feature(40)]}, {0: [("mm", "cat@5")], 1: [("mm", "dog@40")]}),
        ({"mm_features": [feature(5), feature(40), feature(70)]}, None),
        ({"prompt_embeds": object()}, None),
        ({"lora_request": SimpleNamespace(lora_int_id=99, lora_path="p")}, None),  # none was loaded
    ],
)
def test_what_is_in_the_key(request_fields, extras):
    assert (
        request_extras(
            SimpleNamespace(**request_fields), 32, media=["cat", "dog"][: len(request_fields.get("mm_features", ()))]
        )
        == extras
    )
