"""Published sizes, and sizes worked out by hand from the papers' formulas: bytes per token, curves, real logs."""

import pytest

from kvlab.sizing import size_calculator

PER_TOKEN = {
    "Qwen2.5-0.5B": 12_288,
    "Qwen2.5-1.5B": 28_672,
    "Qwen2.5-3B": 36_864,
    "Qwen2.5-7B": 57_344,
    "Qwen2.5-14B": 196_608,
    "Qwen2.5-32B": 262_144,
    "Qwen2.5-72B": 327_680,
    "Qwen3-0.6B": 114_688,
    "Qwen3-1.7B": 114_688,
    "Qwen3-4B": 147_456,
    "Qwen3-8B": 147_456,
    "Qwen3-14B": 163_840,
    "Qwen3-32B": 262_144,
    "Qwen3-30B-A3B": 98_304,
    "Qwen3-235B-A22B": 192_512,
    "Qwen3-Coder-480B-A35B-Instruct": 253_952,
    "Llama-2-7b-hf": 524_288,
    "Llama-2-13b-hf": 819_200,
    "Llama-2-70b-hf": 327_680,
    "Llama-3.1-8B": 131_072,
    "Llama-3.1-70B": 327_680,
    "Llama-3.1-405B": 516_096,
    "Llama-3.2-1B": 32_768,
    "Llama-3.2-3B": 114_688,
    "Mistral-7B-v0.3": 131_072,
    "Mixtral-8x7B-v0.1": 131_072,
    "Mixtral-8x22B-v0.1": 229_376,
    "Mistral-Nemo-Instruct-2407": 163_840,
    "Mistral-Large-Instruct-2407": 360_448,
    "phi-4": 204_800,
    "Phi-3.5-mini-instruct": 393_216,
    "gemma-2b": 18_432,
    "gemma-7b": 458_752,
    "Yi-34B": 245_760,
    "falcon-7b": 8_192,
    "falcon-40b": 122_880,
    "GLM-4.5": 376_832,
    "GLM-4.5-Air": 188_416,
    "glm-4-9b-chat": 40_960,
    "MiniMax-M2.5": 253_952,
    "SmolLM2-135M": 23_040,
    "opt-125m": 36_864,
    "gpt2": 36_864,
    "internlm2_5-7b": 131_072,
    "DeepSeek-V3": 70_272,
    "DeepSeek-R1": 70_272,
    "Kimi-K2-Instruct": 70_272,
    "DeepSeek-V2": 69_120,
    "DeepSeek-V2-Lite": 31_104,
    "DeepSeek-V3.2": 70_272 + 8_052,
    "Llama-3_3-Nemotron-Super-49B-v1": 200_704,
}


@pytest.mark.parametrize(("model", "expected"), PER_TOKEN.items())
def test_bytes_per_token_in_bf16(model: str, expected: int) -> None:
    assert size_calculator(model, "bf16").bytes_per_token == expected


# model -> growing bytes per token, {window: bytes per token}, fixed bytes
CURVES = {
    "gpt-oss-20b": (24_576, {128: 12 * 2_048}, 0),
    "gpt-oss-120b": (36_864, {128: 18 * 2_048}, 0),
    "gemma-3-27b-it": (81_920, {1024: 52 * 8_192}, 0),
    "gemma-3-12b-it": (65_536, {1024: 40 * 8_192}, 0),
    "gemma-3-4b-it": (20_480, {1024: 29 * 4_096}, 0),
    "gemma-2-9b": (172_032, {4096: 21 * 8_192}, 0),
    "gemma-4-26B-A4B": (20_480, {1024: 25 * 8_192}, 0),
    "gemma-3n-E4B-it": (8_192, {512: 16 * 2_048}, 0),
    "MiMo-V2-Flash": (23_040, {128: 39 * 5_120}, 0),
    "Llama-4-Scout-17B-16E-Instruct": (49_152, {8192: 36 * 4_096}, 0),
    "Mistral-7B-v0.1": (0, {4096: 131_072}, 0),
    "Qwen3.5-27B": (65_536, {}, 48 * 3_207_168),
    "Qwen3.5-9B": (32_768, {}, 51_511_296),
    "Qwen3-Next-80B-A3B-Instruct": (24_576, {}, 77_266_944),
    "Nemotron-H-56B-Base-8K": (40_960, {}, 54 * 16_900_096),
    "Nemotron-H-8B-Base-8K": (16_384, {}, 102_137_856),
    "Jamba-v0.1": (16_384, {}, 16_056_320),
    "Bamba-9B": (12_288, {}, 123_104_768),
    "Falcon-H1-0.5B-Instruct": (18_432, {}, 28_698_624),
    "Kimi-K3": (27_648, {}, 449_372_160),
}


@pytest.mark.parametrize(("model", "curve"), CURVES.items())
def test_curve_in_bf16(model: str, curve: tuple[int, dict[int, int], int]) -> None:
    size = size_calculator(model, "bf16")
    assert (size.growing_bytes, size.windows, size.fixed_bytes) == curve
    growing, windows, fixed = curve
    for n in (0, 1, 127, 128, 4097, 32_768, 131_072):
        assert size.at(n) == growing * n + sum(b * min(n, w) for w, b in windows.items()) + fixed


@pytest.mark.parametrize(
    ("model", "gib"),
    {
        "Qwen2.5-7B": 1.75,
        "Llama-3.1-8B": 4.0,
        "Llama-2-70b-hf": 10.0,
        "GLM-4.5": 11.5,
        "MiniMax-M2.5": 7.75,
        "gemma-3-27b-it": 2.91,
        "gemma-4-26B-A4B": 0.82,
        "gemma-3n-E4B-it": 0.27,
        "EXAONE-4.0-32B": 2.75,
        "gpt-oss-20b": 0.753,
        "Mistral-7B-v0.1": 0.5,
        "Llama-4-Scout-17B-16E-Instruct": 2.63,
        "DeepSeek-V3": 2.145,
        "DeepSeek-V3.2": 2.39,
        "Qwen3.5-27B": 2.143,
        "Nemotron-H-56B-Base-8K": 2.10,
        "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 0.233,
    }.items(),
)
def test_gib_at_32k(model: str, gib: float) -> None:
    assert size_calculator(model, "bf16").at("32k") / 2**30 == pytest.approx(gib, abs=0.006)


def test_published_figures_of_qwen25_7b() -> None:
    size = size_calculator("Qwen2.5-7B")
    assert round(size.at(776) / 2**30, 4) == 0.0414
    assert size.chunk_bytes(256) == 14 * 2**20
    assert size.at(2048) == 112 * 2**20  # llama.cpp: "KV self size = 112.00 MiB"
    assert size.max_tokens("112MiB") == 2048


def test_published_figures_of_other_models() -> None:
    llama = size_calculator("Llama-3.1-8B")
    assert llama.max_tokens("50GiB") == 409_600  # LMCache: 50 GiB of CPU memory
    assert llama.chunk_bytes(256) == 32 * 2**20
    assert size_calculator("Llama-3.1-70B").chunk_bytes(256) == 80 * 2**20
    # vLLM logs of Llama-3.1-8B: 1952 blocks of 16 tokens were 3.81 GiB, 1478 were 2.89 GiB
    assert round(llama.at(1952 * 16) / 2**30, 2) == 3.81
    assert round(llama.at(1478 * 16) / 2**30, 2) == 2.89
    # SGLang: Qwen3-235B on 4 ranks, 367,404 tokens in 16.46 GiB per rank
    qwen = size_calculator("Qwen3-235B-A22B", "bf16", tp=4)
    assert qwen.rank_bytes(367_404) / 2**30 == pytest.approx(16.46, abs=0.02)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    {
        "bf16": 57_344,
        "fp16": 57_344,
        "fp32": 114_688,
        "fp8": 28_672,
        "fp8_per_token_head": 29_568,
        "int8_per_token_head": 29_568,
        "int4_per_token_head": 15_232,
        "nvfp4": 16_128,
        "q8_0": 57_344 * 34 // 64,
        "q4_0": 57_344 * 18 // 64,
    }.items(),
)
def test_kv_dtypes(dtype: str, expected: int) -> None:
    assert size_calculator("Qwen2.5-7B", dtype).bytes_per_token == expected


def test_sparse_mla_in_fp8() -> None:
    assert size_calculator("DeepSeek-V3.2", "fp8_ds_mla").bytes_per_token == 61 * 656 + 8_052 == 48_068


def test_tensor_parallel_replicates_heads_and_latents() -> None:
    qwen = size_calculator("Qwen2.5-7B", tp=8)
    assert qwen.rank_bytes(1) == 14_336
    assert qwen.bytes_per_token == 114_688
    assert qwen.replication == 2.0
    assert size_calculator("DeepSeek-V3", tp=8).bytes_per_token == 8 * 70_272


def test_pipeline_parallel_counts_the_fattest_stage() -> None:
    assert size_calculator("Qwen2.5-7B", pp=3).rank_bytes(1) == 57_344 // 28 * 10  # 9 + 10 + 9 layers
    assert size_calculator("Qwen2.5-7B", pp=3).at(1) == 57_344
