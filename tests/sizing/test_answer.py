"""The answer object, planning, the comparison, the command line, and what bad input is told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvlab
from kvlab.__main__ import main
from kvlab.errors import ConfigError
from kvlab.sizing import compare_sizes, size_calculator

ROOT = Path(__file__).parents[2]


def test_an_answer_needs_no_heavy_package() -> None:
    code = (
        "import sys, kvlab; assert kvlab.size_calculator('Qwen2.5-7B').at(1) == 57344\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'numpy', 'pandas', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_bytes_per_token_says_why_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"window of 1,024 tokens only; use at\(n\)"):
        size_calculator("gemma-3-27b-it").bytes_per_token  # noqa: B018
    with pytest.raises(ConfigError, match="153,944,064 bytes are fixed per sequence"):
        size_calculator("Qwen3.5-27B").bytes_per_token  # noqa: B018


def test_lengths_and_memory_as_people_write_them() -> None:
    size = size_calculator("Qwen2.5-7B")
    assert size.at("32k") == 32_768 * 57_344
    assert size.max_tokens("80GiB") == 80 * 2**30 // 57_344
    assert size.max_sequences("80GiB", "32k") == 45
    assert size_calculator("Qwen2.5-7B", tp=2).max_tokens("40GiB", per_rank=True) == size.max_tokens("80GiB")


def test_a_size_that_stops_growing_has_no_longest_sequence() -> None:
    size = size_calculator("Mistral-7B-v0.1")
    with pytest.raises(ConfigError, match="any number of tokens fits"):
        size.max_tokens("80GiB")
    assert size.max_tokens("256MiB") == 2048


def test_explain_shows_the_formula_with_numbers_and_the_source() -> None:
    text = size_calculator("Qwen2.5-7B").explain()
    assert "28 x 4 KV heads x (128 + 128) x 2 B = 57,344 B per token" in text
    assert "bytes(n) = 57,344 n" in text
    assert "source: github:Lightning-AI/litgpt" in text
    assert "[port]" in text


def test_html_and_frame() -> None:
    size = size_calculator("Qwen3.5-27B", tp=2)
    html = size._repr_html_()
    assert "vLLM 0.32 reserves" in html
    assert "source:" in html
    frame = size.to_frame()
    assert len(frame) == 64
    assert frame["bytes_per_token"].sum() == size.growing_bytes
    assert frame["fixed_bytes"].sum() == size.fixed_bytes


def test_a_serde_factor_scales_and_rounds_up() -> None:
    half = size_calculator("Qwen2.5-7B", factor=0.3)
    assert half.chunk_bytes(256) == -(-14 * 2**20 * 3 // 10)
    assert "0.3: stored bytes per raw byte" in half.explain()


def test_plan() -> None:
    host, disk = size_calculator("Llama-3.1-8B").plan(["memory://?size=50GiB", "file:///kv?size=1TB"], tokens="32k")
    assert (host.chunks, host.tokens, host.sessions) == (1600, 409_600, 12)
    assert disk.chunks == 10**12 // (32 * 2**20)
    assert host.fits_redis_value
    assert not size_calculator("Qwen-72B", "bf16").plan("redis://h?size=1TB")[0].fits_redis_value  # 640 MiB chunks


def test_breakeven() -> None:
    llama2 = size_calculator("Llama-2-7b-hf", "bf16")
    assert llama2.breakeven(44_025).bytes_per_s / 1e9 == pytest.approx(23.1, abs=0.05)
    assert llama2.breakeven(44_025).speedup(46.2e9) == pytest.approx(2.0, abs=0.01)
    qwen = size_calculator("Qwen2.5-7B", "bf16")
    short = qwen.breakeven(flops=989e12, mfu=0.5, num_params=7.6e9, tokens=256)
    assert short.bytes_per_s / 1e9 == pytest.approx(1.9, abs=0.05)
    long = qwen.breakeven(flops=989e12, mfu=0.5, num_params=7.6e9, tokens=131_072)
    assert long.bytes_per_s < short.bytes_per_s / 2  # attention's n^2 makes long prompts dearer to recompute
    assert qwen.breakeven(1e6, tokens=10, latency_s=1.0).bytes_per_s == float("inf")
    with pytest.raises(ConfigError, match="needs prefill_tokens_per_s, or flops"):
        qwen.breakeven()


def test_cost() -> None:
    cost = size_calculator("Qwen2.5-7B").cost(10_000, per_gb_month=0.1, per_gpu_hour=3.6, prefill_tokens_per_s=10_000)
    assert cost.recompute == pytest.approx(0.001)
    assert cost.store_per_month == pytest.approx(0.057344)
    assert cost.breakeven_reuses_per_month == pytest.approx(57.344)


def test_compare() -> None:
    both = compare_sizes(["Qwen2.5-7B", "DeepSeek-V3"], ["1k", "32k"])
    assert [row["bytes_at_32768"] for row in both.rows] == [32_768 * 57_344, 32_768 * 70_272]
    assert list(both.to_frame().index) == ["Qwen/Qwen2.5-7B", "deepseek-ai/DeepSeek-V3"]
    assert len(both.figure().data) == 2
    assert "DeepSeek-V3" in both._repr_html_()
    assert kvlab.compare_sizes is compare_sizes
    with pytest.raises(ConfigError, match="takes a list"):
        compare_sizes("Qwen2.5-7B")
    with pytest.raises(ConfigError, match="at least one"):
        compare_sizes([])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: size_calculator("Qwen2.5-7B").at(-1), "number of tokens must be"),
        (lambda: size_calculator("Qwen2.5-7B").max_tokens("lots"), "size must be a number of bytes"),
        (lambda: size_calculator("Qwen2.5-7B", "bf17"), "unknown KV dtype 'bf17'; known: auto, fp32, bf16"),
        (lambda: size_calculator("Qwen2.5-7B", tp=0), "tp must be a positive integer"),
        (lambda: size_calculator("Qwen2.5-7B", tp=3), "try 2 or 4"),
        (lambda: size_calculator("Qwen2.5-7B", pp=29), "pp must be at most the number of layers, 28"),
        (lambda: size_calculator("Qwen2.5-7B", factor=0), "factor must be a number"),
        (lambda: size_calculator("Qwen2.5-7B", engine="tgi"), "engine must be one of"),
        (lambda: size_calculator("Qwen2.5-7B", "fp8_ds_mla"), "stores an MLA latent only"),
        (lambda: size_calculator("DeepSeek-V3", "nvfp4"), "an MLA latent has none"),
        (lambda: size_calculator("pythia-2.8b", "q4_0"), "does not divide a width of 80"),
        (lambda: size_calculator({}), "config is empty"),
        (lambda: size_calculator(7), "model must be a name, a dict, a path"),
        (lambda: size_calculator("Qwen2.5-7B").max_sequences("1GB", 0), "positive number of tokens"),
    ],
)
def test_bad_input_gets_one_line_that_says_what_to_do(call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["size", "Qwen2.5-7B", "--tokens", "32k", "--dtype", "fp8", "--tp", "2"]) == 0
    assert "32,768  896 MiB   448 MiB" in capsys.readouterr().out
    assert main(["size", "Qwen2.5-7B", "--tokens", "1k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 1024 * 57_344
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "num_attention_heads": 1,
                                                      "num_key_value_heads": 1, "head_dim": 8}))  # fmt: skip
    assert main(["size", str(tmp_path / "config.json")]) == 0
    assert "bytes(n) = 32 n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [["size", "nobody-7b"], ["size", "gpt2", "--tp", "x"], ["size"], ["fly"], ["size", "gpt2", "--tokens", "-1"]],
)
def test_command_line_mistakes_are_one_line_and_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("kvlab")
    assert err.count("\n") == 1
