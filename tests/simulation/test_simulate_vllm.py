"""The simulator beside vLLM: one traffic through the engine with the connector's tiers, and through `simulate`."""

import importlib.util
from pathlib import Path

import pytest

from kvlab.datasets.tiny_model import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 70


def script():
    spec = importlib.util.spec_from_file_location("simulator_error", ROOT / "benchmarks" / "simulator_error.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = script().CASES


def compared(case, folder, capsys):
    row = script().compare(tiny_llama(folder / "model"), folder / "kv", case, REQUESTS)
    with capsys.disabled():
        print(f"\nsimulator beside engine, hit tokens: {row}")
    assert row["memory_engine"] > 0
    assert row["disk_engine"] > 0, "both tiers are used"
    return row


@pytest.mark.engine
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_hit_tokens_of_each_tier_are_those_of_the_engine(case, tmp_path, capsys):
    row = compared(case, tmp_path, capsys)
    assert (row["memory_difference"], row["disk_difference"]) == (0, 0)


@pytest.mark.engine
def test_where_the_disk_evicts_too_the_difference_is_small(tmp_path, capsys):
    """The engine does not renew on disk what it finds in memory, as the simulated stack does."""
    row = compared(CASES[2], tmp_path, capsys)
    assert row["memory_difference"] == 0
    assert abs(row["disk_difference"]) <= 0.05 * (row["memory_engine"] + row["disk_engine"])
