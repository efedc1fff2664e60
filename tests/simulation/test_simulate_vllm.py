"""The simulator beside vLLM: one traffic through the engine with the connector's tiers, and through `simulate`."""

import importlib.util
from pathlib import Path

import pytest

from kvlab.datasets.tiny_model import tiny_llama
from kvlab.errors import ConfigError
from kvlab.simulation.simulate import simulate
from kvlab.simulation.traffic import traffic_of_prompts

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 70


def script():
    spec = importlib.util.spec_from_file_location("simulator_error", ROOT / "benchmarks" / "simulator_error.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = script().CASES


@pytest.mark.engine
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_hit_tokens_of_each_tier_are_those_of_the_engine(case, tmp_path, capsys):
    row = script().compare(tiny_llama(tmp_path / "model"), tmp_path / "kv", case, REQUESTS)
    with capsys.disabled():
        print(f"\nsimulator beside engine, hit tokens: {row}")
    assert row["memory_engine"] > 0
    assert row["disk_engine"] > 0, "both tiers are used"
    assert (row["memory_difference"], row["disk_difference"]) == (0, 0)


def test_the_connectors_order_is_simulated_over_memory_and_one_tier():
    prompts = script().prompts_of("chat", 30)
    one = simulate(traffic_of_prompts(prompts, block_tokens=32), "1000 blocks", chunk_tokens=64, connector=True)
    assert one.hit_tokens.tolist() == simulate(one.traffic, "1000 blocks", chunk_tokens=64).hit_tokens.tolist()
    assert one.hit_tokens.sum() > 0
    few = simulate(one.traffic, ["3 blocks", "1000 blocks"], chunk_tokens=128, connector=True)
    assert few.hit_tokens.sum() < one.hit_tokens.sum(), "what has no room in memory is neither saved nor loaded"
    for tiers, more in ((["8 blocks"] * 3, {}), ("8 blocks", {"admission": 2})):
        with pytest.raises(ConfigError, match="connector=True simulates host memory"):
            simulate(one.traffic, tiers, connector=True, **more)
