"""The simulator beside vLLM: one traffic through the engine with the connector's tiers, and through `simulate`."""

import importlib.util
from pathlib import Path

import pytest

from kvlab.datasets.tiny_model import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 40


def script():
    spec = importlib.util.spec_from_file_location("simulator_error", ROOT / "benchmarks" / "simulator_error.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.engine
@pytest.mark.parametrize("case", script().CASES[1:4], ids=str)
def test_hit_tokens_of_each_tier_are_those_of_the_engine(case, tmp_path, capsys):
    row = script().compare(tiny_llama(tmp_path / "model"), tmp_path / "kv", case, REQUESTS)
    with capsys.disabled():
        print(f"\nsimulator against engine, hit tokens: {row}")
    assert row["memory_engine"] > 0
    assert row["disk_engine"] > 0, "both tiers are used"
    assert (row["memory_difference"], row["disk_difference"]) == (0, 0)
