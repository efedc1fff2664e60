"""The front door: what goes in, what comes out, sweeps in processes, the command line."""

import json
import subprocess
import sys

import pytest

import kvlab
from kvlab.__main__ import main
from kvlab.errors import ConfigError
from kvlab.simulation.cost import CostModel, Prefill
from kvlab.simulation.generate import generate_traffic
from kvlab.simulation.trace_files import save_traffic
from kvlab.simulation.workers import run_jobs

SOME = generate_traffic("chat", 150, seed=2)


def fails(shared, job):
    raise ConfigError(f"{shared} {job}")


def dies(shared, job):
    import os

    os._exit(3)


def test_front_door_is_light():
    code = (
        "import sys, kvlab; kvlab.simulate('chat', '500 blocks'); kvlab.sweep\n"
        "print([m for m in ('torch', 'plotly', 'pandas', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rows_say_what_ran():
    done = kvlab.simulate(SOME, ["1GiB", "file://?size=3GiB"], model="Qwen2.5-7B", serde=2.0, policy="s3fifo")
    assert done.row["tiers"] == "memory:1 GiB + disk:3 GiB"
    assert (done.row["policy"], done.row["unit"], done.row["serde_ratio"]) == ("s3fifo", "bytes", 2.0)
    assert [row["tier"] for row in done.rows()] == ["memory", "disk"]
    assert done.row["loaded"] == sum(row["tier_loaded"] for row in done.rows()) > 0
    assert all(row["tier_stored"] - row["tier_evicted"] <= row["tier_capacity"] for row in done.rows())
    assert done.hit_tokens.sum() / SOME.num_tokens.sum() == done.row["token_hit_rate"]
    assert sum(row["accesses"] for row in done.reuse()) == SOME.num_blocks.sum()
    assert "block_hit_rate" in done._repr_html_()


def test_bytes_and_blocks_agree():
    """57,344 B per token, so that 100 chunks are as good as their bytes."""
    chunk = 256 * 57_344
    in_bytes = kvlab.simulate(SOME, 100 * chunk, model="Qwen2.5-7B", object_bytes=None).row
    in_blocks = kvlab.simulate(SOME, "1600 blocks").row
    assert in_bytes["capacity"] == in_blocks["capacity"] * 16 * 57_344
    assert in_bytes["block_hit_rate"] == in_blocks["block_hit_rate"]
    assert in_bytes["loaded"] == in_blocks["loaded"] * 16 * 57_344


def test_a_codec_is_worth_its_ratio_in_memory():
    rate = lambda size, serde=None: kvlab.simulate(SOME, size, model="Qwen2.5-7B", serde=serde).row["block_hit_rate"]  # noqa: E731
    assert rate("1GiB", 2.0) == rate("2GiB")
    assert rate("1GiB") < rate("1GiB", 4.0)


def test_a_serde_of_fixed_ratio_goes_by_name():
    row = kvlab.simulate(SOME, "1GiB", model="Qwen2.5-7B", serde="naive").row
    assert row == kvlab.simulate(SOME, "1GiB", model="Qwen2.5-7B").row
    with pytest.raises(ConfigError, match="depends on the KV; measure it"):
        kvlab.simulate(SOME, "1GiB", model="Qwen2.5-7B", serde="lossless")


def test_token_prompts_are_traffic():
    system = list(range(100))
    prompts = [system + [1000 + i] * 60 for i in range(5)]
    done = kvlab.simulate(prompts, "100 blocks", chunk_tokens=16)
    assert done.hit_tokens.tolist() == [0, 96, 96, 96, 96]  # of 100 shared tokens six full blocks


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tiers": "1GiB"}, "needs model"),
        ({"policy": "random"}, "known: arc, belady, fifo"),
        ({"tiers": []}, "at least one tier"),
        ({"tiers": "disk:1TiB"}, "size must be"),
        ({"tiers": "s3://bucket?size=1TiB"}, "the speed of s3://bucket is not known: add gb_per_s"),
        ({"tiers": "file:///kv?sise=1TiB"}, "unknown option 'sise' in 'file:///kv'; known: auth, ca_file, check"),
        ({"tiers": "file:///kv?size=1TiB&serde=int4"}, "serde in the URL of file:///kv holds for one tier"),
        ({"tiers": "file:///kv?size=10 blocks&gb_per_s=fast"}, "gb_per_s must be a number, got 'fast'"),
        ({"tiers": "memory://?size=10 blocks&policy=best"}, "known: arc, belady, fifo"),
        ({"chunk_tokens": 100}, "chunk_tokens must be a multiple of the traffic's block_tokens=16, got 100"),
        ({"serde": 0.0}, "must be positive"),
        ({"serde": 2.0}, "give model"),
        ({"admission": 0}, "admission needs store_threshold >= 1"),
        ({"cost": CostModel(Prefill(1.0))}, "a cost model needs bytes"),
    ],
)
def test_bad_arguments_are_named(how, says):
    with pytest.raises(ConfigError, match=says):
        kvlab.simulate(SOME, **how)


def test_the_url_of_a_store_is_a_tier(tmp_path):
    """What was simulated can be given to vLLM and to a store, but for a speed, which they refuse with the reason."""
    urls = ["memory://?size=1GiB&policy=s3fifo", f"file://{tmp_path}/kv?size=3GiB&shared=true&fsync=true"]
    done = kvlab.simulate(SOME, urls, model="Qwen2.5-7B")
    assert done.row["policy"] == "s3fifo + lru"
    assert kvlab.vllm_config(urls)["kv_connector_extra_config"]["tiers"] == urls
    kvlab.open_store(urls[1]).close()
    fast = [urls[0], urls[1] + "&gb_per_s=12&latency_ms=0.1&per_gb_month=0.02"]
    assert kvlab.simulate(SOME, fast, model="Qwen2.5-7B").row["loaded"] == done.row["loaded"]
    for refuse in (kvlab.vllm_config, lambda tiers: kvlab.open_store(tiers[1])):
        with pytest.raises(ConfigError, match="describes a tier for simulation"):
            refuse(fast)


def test_a_sweep_is_many_simulations_in_any_number_of_processes():
    what = {"policies": ["lru", "belady"], "serdes": [None, 4.0], "model": "Qwen2.5-7B", "progress": False}
    capacities = ["1GiB", ["512MiB", "file:///kv?size=4GiB"]]
    two = kvlab.sweep(SOME, capacities, workers=2, **what)
    assert two == kvlab.sweep(SOME, capacities, workers=1, **what)
    assert [(row["policy"], row["tiers"], row["serde_ratio"]) for row in two[:3]] == [
        ("lru", "memory:1 GiB", 1.0),
        ("lru", "memory:1 GiB", 4.0),
        ("lru", "memory:512 MiB + disk:4 GiB", 1.0),
    ]
    assert two[0] == kvlab.simulate(SOME, "1GiB", model="Qwen2.5-7B").row
    with pytest.raises(ConfigError, match="tiers must be a list"):
        kvlab.sweep(SOME, "1GiB")
    with pytest.raises(ConfigError, match="unknown eviction policy 'random'; known: arc, belady"):
        kvlab.sweep(SOME, ["10 blocks", "20 blocks"], ["random"], workers=2, progress=False)


def test_what_a_worker_raises_is_raised_here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(__import__("pathlib").Path(__file__).parent))
    with pytest.raises(ConfigError, match=r"shared [01]"):
        list(run_jobs("test_simulate_api:fails", "shared", [0, 1], workers=2))
    with pytest.raises(RuntimeError, match="a worker process ended with status 3"):
        list(run_jobs("test_simulate_api:dies", None, [0, 1], workers=2))


def test_command_line(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    save_traffic(generate_traffic("chat", 60, block_tokens=512), path)
    arguments = [
        str(path),
        "--policy",
        "lru,s3fifo",
        "--tiers",
        "1GiB,1GiB+file://?size=10GiB",
        "--model",
        "Qwen2.5-7B",
    ]
    assert main(["simulate", *arguments, "--workers", "1", "--prefill-rate", "20000"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "60 requests" in table[0]
    assert len(table) == 6
    repeated = [*arguments, "--policy", "fifo"]
    assert main(["simulate", *repeated, "--workers", "1", "--json", "--store-threshold", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in answer["rows"]] == ["lru", "lru", "s3fifo", "s3fifo", "fifo", "fifo"]
    assert answer["rows"][0]["store_threshold"] == 2
    assert main(["simulate", "agent", "--limit", "40", "--csv"]) == 0
    assert capsys.readouterr().out.startswith("traffic,policy,")
    for bad in (["simulate"], ["simulate", "absent.jsonl"], ["simulate", "chat", "--tiers", "1GiB"]):
        assert main(bad) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
