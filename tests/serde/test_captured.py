"""KV out of a transformers model, to a file, compared, and back into a cache that goes on generating."""

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvlab
from kvlab.cli.profile import main as profile_main
from kvlab.connectors.captured import KV
from kvlab.connectors.transformers import from_cache, to_cache
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde import get_serde


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENS = [int(token) for token in torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(3))]


def continued(model: LlamaForCausalLM, cache: DynamicCache, position: int, token: int, steps: int = 12) -> list[int]:
    """Greedy tokens after `token` at `position`."""
    made = []
    with torch.inference_mode():
        for step in range(steps):
            logits = model(
                torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[position + step]])
            ).logits
            token = int(logits[0, -1].argmax())
            made.append(token)
    return made


def test_capture_save_load_and_go_on_generating(model: LlamaForCausalLM, tmp_path: Path) -> None:
    kv = kvlab.capture(model, TOKENS)
    assert kv.tensor().shape == (3, 40, 2, 2, 16)
    kv.save(tmp_path / "kv.safetensors")
    loaded = KV.load(tmp_path / "kv.safetensors")
    assert loaded.token_ids == tuple(TOKENS)
    assert loaded.num_positions == 40
    assert not any(error.any() for error in kv.diff(loaded).values())
    fresh = DynamicCache()
    model(torch.tensor([TOKENS]), past_key_values=fresh)
    assert continued(model, to_cache(loaded), 40, 5) == continued(model, fresh, 40, 5)


@pytest.mark.parametrize("spec", ["lossless", "int8"])
def test_decoded_kv_in_place(model: LlamaForCausalLM, spec: str) -> None:
    kv = kvlab.capture(model, TOKENS)
    serde = get_serde(spec)
    back = kv.replaced(serde.decode(serde.encode(kv.tensor(), AXES)))
    errors = kv.diff(back)
    assert errors["key"].shape == (3, 2)
    assert float(max(error.max() for error in errors.values())) <= (0.0 if spec == "lossless" else 0.02)
    assert len(continued(model, to_cache(back), 40, 5)) == 12


def test_a_pruned_cache_with_layers_of_different_length_passes_through(model: LlamaForCausalLM, tmp_path: Path) -> None:
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([TOKENS]), past_key_values=cache)
    for index, layer in enumerate(cache.layers):  # what a press leaves: fewer tokens, another number in each layer
        keep = torch.arange(0, 40, index + 2)
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    kv = from_cache(cache, TOKENS)
    assert [len(key) for key in kv.keys] == [20, 14, 10]
    kv.save(tmp_path / "pruned.safetensors")
    loaded = KV.load(tmp_path / "pruned.safetensors")
    again = from_cache(to_cache(loaded), TOKENS)
    assert not any(error.any() for error in kv.diff(again).values())
    with pytest.raises(ConfigError, match="different shapes"):
        kv.tensor()


def test_what_is_no_kv_file_is_a_format_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"{}", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(FormatError):
            KV.load(path)


def test_captured_kv_is_edited_by_a_copy(model: LlamaForCausalLM) -> None:
    """As the docstring of `KV` says."""
    kv = kvlab.capture(model, TOKENS)
    changed = kv.tensor().clone()
    changed[0, 5] = 0
    edited = kv.replaced(changed)
    assert not edited.keys[0][5].any()
    assert not edited.values[0][5].any()
    assert kv.keys[0][5].any()
    assert float(kv.diff(edited)["key"][1].max()) == 0


def test_kv_of_different_texts_cannot_be_compared(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="cannot be compared"):
        kvlab.capture(model, TOKENS).diff(kvlab.capture(model, TOKENS[:7]))


def test_profile_refuses_silly_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        profile_main([str(tmp_path), str(tmp_path / "t"), "--chunk", "0"])


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(model: LlamaForCausalLM, tmp_path: Path) -> None:
    kv, path = kvlab.capture(model, TOKENS), tmp_path / "kv.safetensors"
    mask = os.umask(0o027)
    try:
        kv.save(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.write_text("old")
    path.chmod(0o604)
    (tmp_path / "link").symlink_to(path)
    kv.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert KV.load(path).token_ids == tuple(TOKENS)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["kv.safetensors", "link"]


def test_layers_that_share_memory_are_saved(tmp_path: Path) -> None:
    half = torch.ones(4, 1, 8)
    KV((half, half), (half, half), (1, 2, 3, 4), 4).save(tmp_path / "kv.safetensors")
    assert all(bool((layer == 1).all()) for layer in KV.load(tmp_path / "kv.safetensors").values)


def test_what_is_no_file_is_not_replaced_and_not_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    kv, pipe = kvlab.capture(model, TOKENS), tmp_path / "pipe"
    os.mkfifo(pipe)
    for call in (kv.save, KV.load):
        for path in (pipe, tmp_path):
            with pytest.raises(ConfigError, match=f"{path} is no regular file"):
                call(path)
    with pytest.raises(ConfigError, match="/dev/null is no regular file"):
        KV.load("/dev/null")
    with pytest.raises(ConfigError, match="none cannot be read: No such file or directory"):
        KV.load(tmp_path / "none")
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    for wrong in (None, 5, "", "a\0b", b"x", Path("a\0b")):
        for call in (kv.save, KV.load):
            with pytest.raises(ConfigError, match="a file must be named by a path"):
                call(wrong)  # type: ignore[arg-type]
    for path in (tmp_path / "none" / "x", tmp_path / ("x" * 300), Path("/proc/x")):
        with pytest.raises(ConfigError, match=f"{path} cannot be written: "):
            kv.save(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pipe"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda kv: {"keys": None}, "keys must be a tensor for each layer, got NoneType"),
        (lambda kv: {"keys": (None, *kv.keys[1:])}, r"keys\[0\] must be a tensor, got NoneType"),
        (lambda kv: {"values": tuple(v.numpy() for v in kv.values)}, r"values\[0\] must be a tensor, got ndarray"),
        (lambda kv: {"keys": tuple(k.to_sparse() for k in kv.keys)}, "a dense tensor with its numbers, got .*sparse"),
        (lambda kv: {"keys": tuple(k.to("meta") for k in kv.keys)}, "a dense tensor with its numbers, got .* meta"),
        (lambda kv: {"states": None}, "states a mapping .* got str and NoneType"),
        (lambda kv: {"states": {3: ((None,),)}}, r"states\[3\] must be a tensor, got NoneType"),
        (lambda kv: {"model": 5}, "model must be text .* got int and dict"),
    ],
)
def test_what_is_no_kv_is_refused_in_one_line(model: LlamaForCausalLM, change: Any, words: str) -> None:
    kv = kvlab.capture(model, TOKENS)
    with pytest.raises(ConfigError, match=words):
        replace(kv, **change(kv))
    for other in (None, 5, kv.tensor()):
        with pytest.raises(ConfigError, match=f"KV is compared with KV, .* got {type(other).__name__}"):
            kv.diff(other)  # type: ignore[arg-type]
