"""models.json: its schema, its names, and every entry computed or refused with a reason that the docs list."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.errors import ConfigError, UnknownModelError
from kvlab.sizing import size_calculator
from kvlab.sizing.catalog import catalog, find_entry
from kvlab.sizing.class_defaults import CLASS_DEFAULTS, ONE_KV_HEAD_PER_HEAD

ROOT = Path(__file__).parents[2]
SOURCE_KINDS = {
    "config_json_copy", "vendor_config", "port", "class_default", "class_default_verified", "docs_table",
    "calculator_data", "test_fixture",
}  # fmt: skip


def _refused() -> dict[str, str]:
    refused = {}
    for name in catalog():
        try:
            size_calculator(name).at(4096)
        except ConfigError as e:
            refused[name] = str(e)
    return refused


def test_every_entry_obeys_the_schema() -> None:
    for name, entry in catalog().items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name), name
        assert entry["source_kind"] in SOURCE_KINDS, name
        assert isinstance(entry["source"], str)
        assert entry["source"], name
        assert set(entry.get("unknown", ())).isdisjoint(entry), name
        assert "/" not in entry.get("_name_or_path", ""), name
    assert list(catalog()) == sorted(catalog(), key=str.lower)


def test_every_entry_computes_or_refuses_and_the_docs_list_the_refusals() -> None:
    refused = _refused()
    text = (ROOT / "docs" / "design" / "sizes.md").read_text(encoding="utf-8")
    section = text.partition("## Refused models")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([\w.-]+/[\w.-]+)`", section)) == set(refused)
    for reason in refused.values():
        assert re.search(r"field '\w+'", reason)
        assert "\n" not in reason


def test_names_are_case_blind_and_need_no_organisation() -> None:
    assert size_calculator("qwen/QWEN2.5-7b").name == size_calculator("Qwen2.5-7B").name == "Qwen/Qwen2.5-7B"


def test_suffixes_are_dropped_only_after_an_exact_miss_and_said() -> None:
    assert find_entry("Qwen2.5-7B-Instruct") == ("Qwen/Qwen2.5-7B-Instruct", "")
    entry, note = find_entry("Qwen2.5-7B-Instruct-AWQ")
    assert entry in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct")
    assert entry in note
    assert "used the entry" in size_calculator("Llama-3.1-8B-Instruct-FP8-dynamic").explain()


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match=r"nearest: .*Qwen2\.5-7B"):
        size_calculator("Qwen2.5-7")
    with pytest.raises(UnknownModelError, match="nearest: none"):
        size_calculator("zzzzzzzzzzzz")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert size_calculator(folder).bytes_per_token == size_calculator(str(folder / "config.json")).bytes_per_token == 64
    assert size_calculator(folder).name == "mine"
    (folder / "hf_quant_config.json").write_text('{"quantization": {"kv_cache_quant_algo": "FP8"}}')
    assert size_calculator(folder).bytes_per_token == 32
    with pytest.raises(ConfigError, match="cannot read"):
        size_calculator(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        size_calculator(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        size_calculator(tmp_path / "list.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # a folder named like a model does not hide the model
    assert size_calculator("gpt2").bytes_per_token == 36_864


def test_the_hub_is_asked_only_on_demand() -> None:
    code = (
        "import os, sys; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "import kvlab\nfrom kvlab.errors import UnknownModelError\n"
        "for hub in (False, True):\n"
        "    try: kvlab.size_calculator('nobody/has-this', hub=hub)\n"
        "    except UnknownModelError as e: print('huggingface_hub' in sys.modules, e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    first, second = out.splitlines()
    assert first.startswith("False no model is called")
    assert second.startswith("True the hub gave no config.json")


def test_class_defaults_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    for model_type, fields in CLASS_DEFAULTS.items():
        own = CONFIG_MAPPING[model_type]()
        for name, value in fields.items():
            if name == "no_rope_layer_interval":
                assert [i for i, rope in enumerate(own.no_rope_layers) if not rope] == list(range(3, 48, 4))
            elif name == "head_dim" and model_type == "gemma4_text":  # its full layers differ
                assert own.per_layer_config[0].head_dim == value
            else:
                assert getattr(own, name) == value, (model_type, name)
    for model_type in ONE_KV_HEAD_PER_HEAD & set(CONFIG_MAPPING):
        own = CONFIG_MAPPING[model_type]().to_dict()
        heads = own.get("num_key_value_heads")
        assert heads is None or heads == (own.get("num_attention_heads") or own.get("num_heads")), model_type


def test_add_model_script(tmp_path: Path) -> None:
    target = tmp_path / "models.json"
    target.write_text('{"schema": 1, "models": {}}')
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
                                  "head_dim": 8, "rope_scaling": {}, "vocab_size": 9}))  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts" / "add_model.py"), "me/Mine-1B", str(config)]
    done = subprocess.run(
        [*command, "--source", "hub:me/Mine-1B", "--catalog", str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    entry = json.loads(target.read_text())["models"]["me/Mine-1B"]
    assert entry["source"] == "hub:me/Mine-1B"
    assert "rope_scaling" not in entry
    assert "256 n" in done.stdout
    again = subprocess.run(
        [*command, "--source", "x", "--catalog", str(target)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "already has" in again.stderr
