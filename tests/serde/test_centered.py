"""Keys with a large constant: what `centered` takes away and gives back."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvlab.cli.profile import main as profile_main
from kvlab.connectors import transformers as transformers_connector
from kvlab.errors import ConfigError
from kvlab.geometry import AXES
from kvlab.serde import get_serde
from kvlab.serde.centered import CenteredSerde, constants, rope_frequencies, rotated
from kvlab.testing.serde import kv_like

SHAPE = (2, 128, 2, 2, 32)


def with_constant(size: float, *, theta: float = 10000.0, style: str = "half", first: int = 777) -> torch.Tensor:
    """Keys as a model with a bias of such a size has them, from position `first` on."""
    kv = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    kv[..., 0, :] += size * torch.randn(2, 1, 2, 32, generator=torch.Generator().manual_seed(1))
    frequencies = rope_frequencies(32, theta)
    for layer in range(2):  # as if `first` tokens were before
        before = torch.zeros(first, 2, 32, dtype=torch.float64)
        turned = rotated(torch.cat([before, kv[layer, ..., 0, :].double()]), frequencies, style, 1.0)
        kv[layer, ..., 0, :] = turned[first:].float()
    return kv


def key_error(spec: str, kv: torch.Tensor) -> float:
    """Error of K in units of what differs between tokens: 1, by construction."""
    serde = get_serde(spec)
    back = serde.decode(serde.encode(kv, AXES))
    return float((back[..., 0, :] - kv[..., 0, :]).square().mean().sqrt())


@pytest.mark.parametrize(("bits", "plain"), [(4, "int4"), (8, "int8:k=channel")])
@pytest.mark.parametrize("size", [0.0, 50.0, 1000.0])
def test_a_constant_of_any_size_costs_nothing(bits: int, plain: str, size: float) -> None:
    without = key_error(plain, with_constant(0.0))
    assert key_error(f"centered:bits={bits}", with_constant(size)) < 2 * without
    if size:
        assert key_error(plain, with_constant(size)) > 10 * without


def test_the_place_in_the_prompt_need_not_be_known() -> None:
    errors = {first: key_error("centered", with_constant(50.0, first=first)) for first in (0, 1, 100_000)}
    assert max(errors.values()) < 1.1 * min(errors.values())


def test_another_rope_costs_quality_and_nothing_else() -> None:
    kv = with_constant(50.0, theta=500.0)
    assert key_error("centered:bits=8,theta=500", kv) < 0.02
    assert key_error("centered:bits=8", kv) > 0.02
    assert key_error("centered:bits=8", kv) < 1.1 * key_error("int8:k=channel", kv)
    paired = with_constant(50.0, style="pairs")
    assert key_error("centered:bits=8,style=pairs", paired) < 0.02


def test_channels_that_do_not_turn_stay() -> None:
    kv = with_constant(0.0)
    kv[..., 0, 8:] += 1000.0
    assert key_error("centered:bits=8,rotary=8", kv) < 0.02


def test_an_object_is_read_without_options() -> None:
    serde = CenteredSerde(bits=8, style="pairs", frequencies=[0.5, 0.25, 0.125])
    kv = kv_like(SHAPE)
    assert get_serde("centered").decode(serde.encode(kv, AXES)).equal(serde.decode(serde.encode(kv, AXES)))


def test_a_rotation_and_back_is_nothing() -> None:
    keys = torch.randn(9, 2, 33, dtype=torch.float64)
    frequencies = rope_frequencies(32, 10000.0)
    for style in ("half", "pairs"):
        turned = rotated(keys, frequencies, style, -1.0)
        assert not turned.allclose(keys)
        assert turned[..., 32].equal(keys[..., 32])
        assert rotated(turned, frequencies, style, 1.0).allclose(keys, atol=1e-12)
    assert rotated(keys, frequencies, "half", 1.0)[1, 0, 0] == pytest.approx(
        float(keys[1, 0, 0]) * math.cos(1) - float(keys[1, 0, 16]) * math.sin(1)
    )


def test_constants_are_seen_by_layer() -> None:
    kv = with_constant(50.0)
    kv[0] = with_constant(0.0)[0]
    found = constants(kv, AXES, rope_frequencies(32, 10000.0))
    assert found[0] < 1
    assert 30 < found[1] < 70


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("bits=5", "bits must be 4 or 8"),
        ("theta=x", "must be numbers"),
        ("theta=nan", "theta must be above 1"),
        ("theta=1", "theta must be above 1"),
        ("rotary=3", "rotary even"),
        ("style=x", "one of half, pairs"),
        ("group=-1", "group must be"),
    ],
)
def test_options_that_cannot_be_are_refused(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_serde(f"centered:{options}")


def test_more_turning_channels_than_a_head_has_are_refused() -> None:
    for serde in (get_serde("centered:rotary=64"), CenteredSerde(frequencies=[0.1] * 17)):
        with pytest.raises(ConfigError, match=r"rotary must be at most head_dim|17 frequencies do not fit"):
            serde.encode(kv_like(SHAPE), AXES)


def biased_model(folder: Path, size: float) -> Path:
    """A small Llama whose second layer has a bias in K of such a size."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, attention_bias=True, rope_theta=500.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(10)
        model.model.layers[1].self_attn.k_proj.bias.copy_(size * torch.randn(32))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "warns"), [(0.0, False), (500.0, True)])
def test_profile_warns_of_layers_whose_keys_carry_a_large_constant(
    size: float, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = biased_model(tmp_path / "model", size)
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(transformers_connector, "tokenize", lambda *_: ids)  # there is no tokenizer beside it
    text = tmp_path / "text"
    text.write_text("words")
    assert profile_main([str(folder), str(text), "--chunk", "128", "--json"]) == 0  # 22 tokens are too few to tell
    out, told = capsys.readouterr()
    assert list(json.loads(out)["large_constants"]) == (["1"] if warns else [])
    assert ("keys of layers 1 carry a constant" in told) == warns
    assert ("Take centered:theta=500 or lossless" in told) == warns
