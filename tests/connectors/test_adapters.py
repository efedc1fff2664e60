"""LoRA adapters and images: what changes KV besides the tokens is in the key."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvlab.connectors.vllm.requests import request_extras
from tests.connectors.engine import MAX_TOKENS, Answer, connector, engine, prompt

RANK, HIDDEN, LAYERS = 8, 576, 30


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


def ask(llm, adapter_id: int | None, path: str = "", name: str = "") -> Answer:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = LoRARequest(name, adapter_id, path) if adapter_id is not None else None
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt(300)}]
    (output,) = llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)
    return Answer(list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get("kvlab", {}))


def test_adapters_do_not_share(tmp_path, expected):
    one, two = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    asked = [(None, "", ""), (1, one, "x"), (2, two, "y")]
    settings = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    with engine(["memory://?size=256MiB"], settings) as llm:
        first = [ask(llm, *each) for each in asked]
        second = [ask(llm, *each) for each in asked]
        assert [answer.hit for answer in first] == [0, 0, 0]
        assert [answer.hit for answer in second] == [299, 299, 299]
        assert [answer.tokens for answer in first] == [answer.tokens for answer in second]
        assert first[0].tokens == expected(prompt(300))
        assert len({tuple(answer.tokens) for answer in first}) == 3, "adapters that change nothing would prove nothing"
        adapter(tmp_path / "one", 3)  # the same name and folder, other weights
        assert ask(llm, 3, one, "x").hit == 0
        assert not connector(llm).hook_errors


def feature(identifier: str | None, offset: int) -> SimpleNamespace:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset))


@pytest.mark.parametrize(
    ("request_fields", "extras"),
    [
        ({}, {}),
        ({"cache_salt": "s"}, {0: [("cache_salt", "s")]}),
        ({"mm_features": [feature("cat", 5), feature("dog", 40)]}, {0: [("mm", "cat@5")], 1: [("mm", "dog@40")]}),
        ({"mm_features": [feature(None, 5)]}, None),
        ({"prompt_embeds": object()}, None),
    ],
)
def test_what_is_in_the_key(request_fields, extras):
    assert request_extras(SimpleNamespace(**request_fields), 32) == extras
