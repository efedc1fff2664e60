"""What holds for every model there could be."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.sizing import KVSize, size_calculator

KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


@st.composite
def configs(draw: st.DrawFn, *, states: bool = True) -> dict[str, Any]:
    heads = 2 ** draw(st.integers(0, 4))
    layers = draw(st.lists(st.sampled_from(KINDS if states else KINDS[:3]), min_size=1, max_size=6))
    config = {
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": heads,
        "head_dim": draw(st.sampled_from([16, 64, 128])),
        "hidden_size": 1024,
        "sliding_window": draw(st.integers(1, 600)),
        "attention_chunk_size": draw(st.integers(1, 600)),
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "torch_dtype": "bfloat16",
    }
    if draw(st.booleans()):
        config |= {"kv_lora_rank": 256, "qk_rope_head_dim": draw(st.sampled_from([32, 64]))}
    return config


TOKENS = st.integers(0, 5000)
RANKS = st.sampled_from([1, 2, 4, 8, 16])


@given(configs(), TOKENS, TOKENS, RANKS, st.sampled_from(["vllm", "transformers"]))
def test_more_tokens_never_need_less(config: dict[str, Any], n: int, more: int, tp: int, engine: str) -> None:
    size = size_calculator(config, tp=tp, engine=engine)
    assert size.at(n) <= size.at(n + more)
    assert size.rank_bytes(n) <= size.rank_bytes(n + more)


@given(configs(), TOKENS, RANKS, st.floats(0.05, 1.5))
def test_memory_for_n_tokens_holds_n_tokens(config: dict[str, Any], n: int, tp: int, factor: float) -> None:
    size = size_calculator(config, tp=tp, factor=factor)
    if size.growing_bytes:
        most = size.max_tokens(size.at(n))
        assert most >= n
        assert size.at(most) == size.at(n) < size.at(most + 1)
        assert size.max_tokens(size.rank_bytes(n), per_rank=True) >= n


@given(configs(), TOKENS, RANKS)
def test_ranks_together_never_hold_less_than_one(config: dict[str, Any], n: int, tp: int) -> None:
    one, many = size_calculator(config), size_calculator(config, tp=tp)
    assert many.at(n) >= one.at(n)
    assert many.rank_bytes(n) * tp >= one.at(n)


@given(configs(), TOKENS, st.integers(1, 6))
def test_stages_together_hold_everything(config: dict[str, Any], n: int, pp: int) -> None:
    pp = min(pp, config["num_hidden_layers"])
    size: KVSize = size_calculator(config, pp=pp)
    assert size.at(n) == size_calculator(config).at(n)
    assert size.at(n) / pp <= size.rank_bytes(n) <= size.at(n)


@given(configs(states=False), TOKENS)
def test_fp8_is_half_of_bf16_where_nothing_else_is_stored(config: dict[str, Any], n: int) -> None:
    assert 2 * size_calculator(config, "fp8").at(n) == size_calculator(config, "bf16").at(n)


@given(configs(), TOKENS)
def test_layers_add_up(config: dict[str, Any], n: int) -> None:
    size = size_calculator(config)
    rows = size.per_layer()
    held = [n if row["window"] is None else min(n, row["window"]) for row in rows]
    total = sum(row["bytes_per_token"] * h + row["fixed_bytes"] for row, h in zip(rows, held, strict=True))
    assert total == size.at(n)


@given(st.integers(1, 40), st.integers(1, 32), st.sampled_from([32, 64, 128]))
def test_multi_head_is_four_bytes_per_layer_and_hidden_unit(layers: int, heads: int, width: int) -> None:
    config = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width,
    }
    assert size_calculator(config, "bf16").bytes_per_token == 4 * layers * heads * width


@given(configs(), st.integers(1, 5000), RANKS)
@settings(max_examples=60)
def test_reserved_is_at_least_logical(config: dict[str, Any], n: int, tp: int) -> None:
    size = size_calculator(config, tp=tp)
    assert size.reserved(n).bytes >= size.rank_bytes(n)
