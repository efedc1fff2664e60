"""Files of KV that prove themselves: what an engine says behind them stands in them, and is asked again."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kvlab
from kvlab.connectors.captured import KV
from kvlab.connectors.proven_file import content_id, read_proven
from kvlab.connectors.vllm.by_hand.written import ByHand
from kvlab.errors import ConfigError, FormatError
from tests.connectors.engine import generate, prompt, shared
from tests.connectors.test_attach import TIERS, answer, worst, zeroed


@pytest.fixture
def cache():
    return kvlab.attach(shared(TIERS))


@pytest.fixture
def saved(cache, tmp_path):
    kv = cache.read(prompt(130))
    cache.save(tmp_path / "kv.safetensors", kv)
    return tmp_path / "kv.safetensors", kv


def changed(path, name, change, *, is_hidden=True):
    """The file with another value of a field of its proof, or other tensors; `is_hidden`: with their digest."""
    with safe_open(path, "pt") as opened:
        fields, parts = dict(opened.metadata()), {each: opened.get_tensor(each) for each in opened.keys()}  # noqa: SIM118
    proof = json.loads(fields["proof"])
    if name in proof:
        proof[name] = change(proof[name])
    else:
        parts[name] = change(parts[name])
    fields["proof"] = json.dumps(proof)
    if is_hidden:
        fields["proof"] = json.dumps({**proof, "content": content_id(parts, fields)})
    save_file(parts, path, fields)


def test_a_file_is_loaded_proven_and_serves_its_prompt(cache, saved):
    path, kv = saved
    found = cache.load(path)
    assert worst(kv, found) == 0
    assert found.token_ids == tuple(prompt(130))
    llm = shared(TIERS)
    assert answer(llm, cache.write(list(found.token_ids), found))[0] == generate(llm, [prompt(130)])[0].tokens
    assert worst(kv, KV.load(path)) == 0  # without an engine it is an ordinary file of KV


def test_the_file_of_an_edit_proves_the_edit(cache, saved, tmp_path):
    _, kv = saved
    cache.save(tmp_path / "edit.safetensors", zeroed(kv, 2))
    assert float(cache.load(tmp_path / "edit.safetensors").values[2].abs().max()) == 0


def test_numbers_that_were_changed_are_refused_unless_told_otherwise(cache, saved):
    path, _ = saved
    changed(path, "layers.2.value", lambda value: value * 0)
    with pytest.raises(FormatError, match=r"says what this engine does not: a logprob differs by .* nats") as raised:
        cache.load(path)
    assert raised.value.reason == "unproven"
    assert float(cache.load(path, check=False).values[2].abs().max()) == 0


def test_tokens_in_another_order_are_told_though_no_logprob_changes(cache, saved):
    path, _ = saved
    order = torch.cat([torch.tensor([0]), torch.arange(128, 0, -1), torch.tensor([129])])
    names = [f"layers.{layer}.{half}" for layer in range(6) for half in ("key", "value")]
    for name in names:
        changed(path, name, lambda part: part[order].contiguous(), is_hidden=False)
    with pytest.raises(FormatError, match="does not hold what was saved; check=False") as raised:
        cache.load(path)
    assert raised.value.reason == "unproven"
    for name in names:
        changed(path, name, lambda part: part)
    cache.load(path)  # so it is the digest that told them


@pytest.mark.parametrize("tolerance", ["x", -1, float("nan"), float("inf")])
def test_a_tolerance_is_a_number_of_nats(cache, saved, tolerance):
    with pytest.raises(ConfigError, match="tolerance must be a number of nats from 0 on, got"):
        cache.load(saved[0], tolerance=tolerance)


def test_a_file_that_names_other_tokens_is_refused(cache, saved):
    """They compute nothing, but for the last one: the logprobs would stay."""
    path, kv = saved
    with safe_open(path, "pt") as opened:
        fields, parts = dict(opened.metadata()), {each: opened.get_tensor(each) for each in opened.keys()}  # noqa: SIM118
    about = json.loads(fields["about"])
    about["token_ids"][3] += 1
    save_file(parts, path, {**fields, "about": json.dumps(about)})
    with pytest.raises(FormatError, match="does not hold what was saved; check=False"):
        cache.load(path)
    assert cache.load(path, check=False).token_ids[3] == kv.token_ids[3] + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("windows", [3] * 6),
        ("num_positions", 130.0),
        ("token_ids", []),
        ("token_ids", [-1] * 130),
        ("token_ids", None),
        ("token_ids", [2**40] * 130),
        ("token_ids", [2**70] * 130),
        ("windows", 3),
    ],
)
def test_a_file_whose_words_are_of_other_kinds_is_refused(cache, saved, field, value):
    path, _ = saved
    with safe_open(path, "pt") as opened:
        fields, parts = dict(opened.metadata()), {each: opened.get_tensor(each) for each in opened.keys()}  # noqa: SIM118
    about = {**json.loads(fields["about"]), field: value}
    save_file(parts, path, {**fields, "about": json.dumps(about)})
    with pytest.raises(FormatError, match=str(path)):
        cache.load(path)


def test_a_prompt_as_long_as_the_engine_takes_is_proven_with_the_places_there_are(cache, tmp_path):
    path, longest = tmp_path / "long.safetensors", shared(TIERS).llm_engine.model_config.max_model_len
    halves = tuple(torch.zeros(longest - 2, 3, 64) for _ in range(6))
    cache.save(path, KV(halves, halves, tuple(range(longest - 2)), longest - 2))
    assert len(read_proven(path)[1].tokens) == 2
    assert cache.load(path).num_positions == longest - 2
    halves = tuple(torch.zeros(longest - 1, 3, 64) for _ in range(6))
    with pytest.raises(ConfigError, match=r"a prompt of 1,023 tokens leaves no room for a proof of 2.*kv.save\(path\)"):
        cache.save(path, KV(halves, halves, tuple(range(longest - 1)), longest - 1))


def test_an_answer_that_did_not_use_the_kv_proves_nothing(cache, saved, monkeypatch):
    path, _ = saved
    monkeypatch.setattr(ByHand, "match", lambda *_: 0)  # as a hook that raises does
    with pytest.raises(FormatError, match="the engine used 0 of 129 tokens"):
        cache.load(path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model", lambda old: {**old, "weights": "others"}, "weights differ"),
        ("rope", lambda old: {**old, "rope_theta": 3}, "rope differ"),
    ],
)
def test_a_file_of_another_model_is_refused(cache, saved, name, change, words):
    path, _ = saved
    changed(path, name, change)
    with pytest.raises(FormatError, match=words) as raised:
        cache.load(path)
    assert raised.value.reason == "wrong_model"


def test_a_codec_codes_the_file_and_is_part_of_the_proof(cache, saved, tmp_path):
    plain, kv = saved
    path = tmp_path / "coded.safetensors"
    cache.save(path, kv, codec="int8")
    assert path.stat().st_size < 0.4 * plain.stat().st_size
    assert read_proven(path)[1].codec == "int8"
    assert 0 < worst(kv, cache.load(path)) < 0.05


def test_what_is_no_such_file_is_refused_in_one_line(cache, saved, tmp_path):
    _, kv = saved
    kv.save(tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match=r"carries no proof of format 3; KV.load reads files without one"):
        cache.load(tmp_path / "plain.safetensors")
    (tmp_path / "noise").write_bytes(b"noise" * 100)
    with pytest.raises(FormatError, match="is not a readable file of KV"):
        cache.load(tmp_path / "noise")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("logprobs", lambda old: old[:-1], "not a readable file of KV"),
        ("logprobs", lambda old: [{**at, "7": float("nan")} for at in old], "numbers that are none"),
        ("tokens", lambda old: [], "a proof of 0 tokens"),
        ("tokens", lambda old: old[:1], "a proof of 1 tokens"),
        ("model", lambda old: None, "names neither model nor rope"),
        ("tokens", lambda old: [10**9, *old[1:]], "names tokens beyond the model's 49152"),
        ("layers.0.key", lambda old: old[:, :, :32].contiguous(), "not a readable file|does not fit this engine"),
        ("layers.0.key", lambda old: old * float("inf"), "V|K of layer 0 holds NaN or infinity"),
    ],
)
def test_broken_proofs_are_format_errors(cache, saved, name, change, words):
    path, _ = saved
    changed(path, name, change)
    with pytest.raises(FormatError, match=words):
        cache.load(path)
