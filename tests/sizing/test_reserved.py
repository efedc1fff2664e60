"""Reserved figures against logs and runs of vLLM; the engine itself is asked in test_vllm_oracle.py."""

import pytest

from kvlab.errors import ConfigError
from kvlab.sizing import size_calculator


def test_plain_model_is_rounded_to_blocks() -> None:
    size = size_calculator("Qwen2.5-7B", "bf16")
    plain = size.reserved(8192, block_size=128)
    assert plain.bytes_per_block == 7_340_032
    assert plain.pool_blocks("80GiB") == 11_702
    assert plain.capacity_tokens("80GiB") == 1_497_856
    assert plain.max_sequences("80GiB") == pytest.approx(182.84, abs=0.005)
    assert size.reserved(17).bytes == 2 * 16 * 57_344


def test_windows_hold_what_is_in_flight() -> None:
    held = size_calculator("gemma-3-27b-it", "bf16").reserved(
        8192, block_size=128, max_num_batched_tokens=2048, max_concurrent_batches=1
    )
    assert [group.num_layers for group in held.groups] == [9, 9, 9, 9, 8, 8, 10]
    assert held.num_blocks == 214
    assert held.bytes / 2**30 == pytest.approx(2.09, abs=0.005)


def test_unequal_pages_are_equalised_by_larger_blocks() -> None:
    held = size_calculator("gemma-4-26B-A4B", "bf16").reserved(8192, block_size=128)
    assert {page.block_size for group in held.groups for page, _ in group.pages} == {128, 256}
    assert len({page.page_bytes for group in held.groups for page, _ in group.pages}) == 1


def test_hybrid_blocks_grow_to_the_state() -> None:
    nemotron = size_calculator("Nemotron-H-56B-Base-8K", "bf16").reserved(8192, block_size=128)
    assert nemotron.block_size == 4224
    assert len(nemotron.groups) == 7
    assert nemotron.num_blocks == 8  # two attention blocks, one state for each of six groups
    assert nemotron.bytes_per_block == 10 * 4224 * 4096  # ten attention layers
    assert size_calculator("Qwen3.5-9B", "bf16").reserved(8192).block_size == 528  # public vLLM log
    assert size_calculator("Qwen3.6-27B", "bf16").reserved(8192).block_size == 784  # public vLLM log


def test_reserved_is_never_below_logical() -> None:
    for model in ("Qwen2.5-7B", "gemma-3-27b-it", "DeepSeek-V3", "Qwen3.5-27B", "gpt-oss-20b", "Kimi-K3"):
        for tp in (1, 2):
            size = size_calculator(model, "bf16", tp=tp)
            for n in (1, 100, 5_000, 100_000):
                assert size.reserved(n).bytes >= size.rank_bytes(n)


def test_reserved_refuses_what_it_does_not_model() -> None:
    with pytest.raises(ConfigError, match="model vLLM"):
        size_calculator("Qwen2.5-7B", engine="transformers").reserved(8)
    with pytest.raises(ConfigError, match="must be positive"):
        size_calculator("Qwen2.5-7B").reserved(0)
