"""Recurrent states read out of a real engine, changed, and written back: against transformers, and beside others."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import kvlab
from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import to_cache
from kvlab.errors import ConfigError, FormatError
from kvlab.reuse import kept, pasted, turned
from tests.connectors.engine import connector, engine, generate, prompt
from tests.connectors.recurrent import overwritten, recurrent, without_states_within_a_step
from tests.connectors.test_attach import TIERS, answer_ids, worst
from tests.connectors.test_attach_files import changed


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Three layers of Mamba-2 and one of attention; steps of any length."""
    with without_states_within_a_step():
        yield recurrent(tmp_path_factory.mktemp("granite4"), "granite4") | {"max_num_batched_tokens": 1024}


@pytest.fixture(scope="module")
def llm(settings):
    with engine([TIERS], settings, chunk_tokens=64) as llm:
        yield llm


@pytest.fixture
def cache(llm):
    return kvlab.attach(llm)


def plain(llm, tokens):
    assert llm.reset_prefix_cache()
    return generate(llm, [tokens], detokenize=False)[0].tokens


def edited(kv, part=1):
    """The same KV with other states: a part of the second layer's is zero."""
    states = {}
    for end, layers in kv.states.items():
        own = [tuple(tensor.clone() for tensor in tensors) for tensors in layers]
        own[1][part].zero_()
        states[end] = tuple(own)
    return replace(kv, states=states)


def longer(asked, tokens):
    return {**asked, "prompt_token_ids": list(tokens)}


@pytest.mark.parametrize("length", [1, 2, 32, 33, 300])
def test_what_is_read_is_transformers_state_of_the_same_model(settings, cache, length):
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    kv = cache.read(prompt(length))
    assert sorted(kv.states) == sorted({max(length - 1, 1), length})
    for end, states in kv.states.items():
        whole = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.tensor([prompt(end)]), past_key_values=whole)
        layers = [layer for layer in whole.layers if hasattr(layer, "recurrent_states")]
        for (inputs, state), layer in zip(states, layers, strict=True):
            assert torch.allclose(state, layer.recurrent_states[0][0], rtol=1e-3, atol=1e-4)
            assert torch.allclose(inputs, layer.conv_states[0][0, :, 1:].T, rtol=1e-3, atol=1e-4)
    assert torch.allclose(kv.keys[0], whole.layers[2].keys[0].transpose(0, 1), rtol=1e-3, atol=1e-4) or end != length


@pytest.mark.parametrize("length", [2, 31, 32, 33, 34, 65, 300])
def test_what_is_written_is_gone_on_from_at_any_token(llm, cache, length):
    """An engine's own hits end with a block; these end with a token."""
    with overwritten(llm):
        kv = cache.read(prompt(length))
        asked = cache.write(prompt(length), kv)
        assert answer_ids(llm, asked) == (plain(llm, prompt(length)), length - 1)
        more = longer(asked, prompt(length + 40))
        assert answer_ids(llm, more) == (plain(llm, prompt(length + 40)), length)
        again = answer_ids(llm, more)[0]  # vLLM's prefix cache has what was computed behind it
        assert again == plain(llm, prompt(length + 40))
    assert not connector(llm).hook_errors


@pytest.mark.parametrize("part", [0, 1])
def test_an_edited_state_changes_what_is_said_and_no_other_request(llm, cache, part):
    kv = cache.read(prompt(301))
    right = plain(llm, prompt(301))
    asked = cache.write(prompt(301), edited(kv, part))
    same = cache.compare(prompt(301), cache.write(prompt(301), kv), max_tokens=4)
    change = cache.compare(prompt(301), asked, max_tokens=4)
    assert (same.same_tokens, same.agreement) == (4, 1.0)
    assert change.same_tokens < 4
    assert change.kl > 1e-5 > same.kl
    assert change.after.cached_tokens == 300
    held = set(connector(llm).scheduler.index._entries)
    assert answer_ids(llm, longer(asked, prompt(480)))[1] == 301
    assert set(connector(llm).scheduler.index._entries) == held
    assert plain(llm, prompt(301)) == right
    assert worst(kv, cache.read(prompt(301))) < 1e-3
    found = kv.diff(edited(kv, part))
    assert found["key"].max() == 0
    assert (found["state"][:, 1] > 0).all()
    assert found["state"][:, [0, 2]].max() == 0
    cache.clear()
    assert answer_ids(llm, asked) == (right, 0)


def test_many_at_once_each_go_on_from_their_own(llm, cache):
    from vllm import SamplingParams

    lengths = [33, 64, 100, 201]
    kvs = [cache.read(prompt(length)) for length in lengths]
    asked = [cache.write(prompt(length), kv) for length, kv in zip(lengths, kvs, strict=True)]
    others = [{"prompt_token_ids": prompt(length)} for length in (70, 130)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    said = [list(each.outputs[0].token_ids) for each in llm.generate([*asked, *others], sampling, use_tqdm=False)]
    assert said == [plain(llm, prompt(length)) for length in (*lengths, 70, 130)]


def test_a_file_holds_the_states_and_proves_them(llm, cache, tmp_path):
    kv, path = edited(cache.read(prompt(130))), tmp_path / "kv.safetensors"
    cache.save(path, kv)
    assert worst(kv, cache.load(path)) == 0
    assert worst(kv, KV.load(path)) == 0
    changed(path, "states.129.0.1", lambda state: state * 3)
    with pytest.raises(FormatError, match="says what this engine does not"):
        cache.load(path)
    with pytest.raises(ConfigError, match="KV with recurrent states is no tensor of tokens"):
        cache.save(path, kv, codec="int8")


def test_what_does_not_fit_is_refused(cache):
    kv = cache.read(prompt(64))

    def refused(words, **changes):
        with pytest.raises(ConfigError, match=words):
            cache.write(prompt(64), replace(kv, **changes))

    refused("KV of 64 tokens must hold states behind 63 and 64 tokens, got none", states={})
    refused("got 63 tokens", states={63: kv.states[63]})
    refused("states of 2 layers do not fit this engine's 3", states={n: held[:2] for n, held in kv.states.items()})
    cut = {n: tuple((a, b[:4]) for a, b in held) for n, held in kv.states.items()}
    refused(r"the state of .* must be .*\[8, 32, 16\]; got .*\[4, 32, 16\]", states=cut)
    kv.states[63][2][1][0, 0, 0] = float("nan")
    refused("behind 63 tokens holds NaN or infinity")
    with pytest.raises(ConfigError, match="states must be of the same layers, each behind 1 to 64 tokens"):
        replace(kv, states={65: kv.states[64]})
    with pytest.raises(ConfigError, match="goes into no cache of transformers"):
        to_cache(kv)
    for function in (lambda: pasted([kv, kv]), lambda: turned(kv, 3, torch.ones(1, 16)), lambda: kept(kv, [1], None)):
        with pytest.raises(ConfigError, match="recurrent states are of all tokens before them in their order"):
            function()
