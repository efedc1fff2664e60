"""KV of pieces put together, on a small random Llama and on the demo model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvlab import capture
from kvlab.connectors.captured import KV
from kvlab.errors import ConfigError
from kvlab.reuse import METHODS, compare_reuse, kept, over_texts, pasted, recomputed, turned, with_seconds
from kvlab.reuse.methods import Case, block_attention, cacheblend, epic, rerope, rope_of
from kvlab.simulation.cost import Prefill
from tests.support.llama import small_llama


@pytest.fixture(scope="module")
def model():
    return small_llama(4)


PIECES = [[(7 * at + 31 * piece) % 200 for at in range(40)] for piece in range(3)]
QUESTION = [5, 9, 13, 17]


@pytest.fixture(scope="module")
def case(model):
    alone = [capture(model, piece) for piece in PIECES]
    return Case(model, alone, capture(model, [token for piece in PIECES for token in piece]))


def worst(kv, other):
    return max(float(error.max()) for error in kv.diff(other).values())


def test_turned_keys_of_the_first_layer_are_those_of_the_whole(case):
    """The first layer's KV depends on token and place alone."""
    made = rerope(case).kv
    assert torch.allclose(made.keys[0], case.whole.keys[0], atol=1e-4)
    assert not torch.allclose(pasted(case.pieces).keys[0], case.whole.keys[0], atol=1e-2)
    assert not torch.allclose(made.keys[2], case.whole.keys[2], atol=1e-2)


def test_turning_forth_and_back_gives_the_keys_again(case, model):
    kv = case.pieces[0]
    assert worst(kv, turned(turned(kv, 300, rope_of(model)), -300, rope_of(model))) < 1e-5


def test_kept_tokens_are_a_shorter_prompt(case, model):
    """In the first layer KV depends on token and place alone, and these are the places of a prompt of that length."""
    places = [0, 3, 4, 40, 77, 119]
    part = kept(case.whole, places, rope_of(model))
    alone = capture(model, [case.whole.token_ids[at] for at in places])
    assert part.token_ids == alone.token_ids
    assert torch.allclose(part.keys[0], alone.keys[0], atol=1e-4)
    assert torch.equal(part.values[3], case.whole.values[3][places])
    assert worst(case.whole, kept(case.whole, range(120), rope_of(model))) < 1e-6
    for wrong in ([], [4, 4], [-1, 3], [120]):
        with pytest.raises(ConfigError, match="must ascend within 0 to 119"):
            kept(case.whole, wrong, rope_of(model))


def test_all_tokens_computed_again_are_the_whole(case, model):
    made = recomputed(model, pasted(case.pieces), range(120))
    assert worst(case.whole, made) < 1e-4


def test_a_token_computed_again_sees_what_is_there(case, model):
    """Behind a context that is right, any choice gives what is there; and tokens not chosen stay as they are."""
    assert worst(case.whole, recomputed(model, case.whole, [3, 50, 51, 119])) < 1e-4
    kv = rerope(case).kv
    made = recomputed(model, kv, [60, 100])
    kept = [at for at in range(120) if at not in (60, 100)]
    assert torch.equal(made.values[3][kept], kv.values[3][kept])
    assert not torch.allclose(made.values[3][[60, 100]], kv.values[3][[60, 100]], atol=1e-3)


def test_a_chosen_token_does_not_see_later_ones(case, model):
    kv = rerope(case).kv
    one, both = recomputed(model, kv, [60]), recomputed(model, kv, [60, 90])
    assert torch.allclose(one.values[3][60], both.values[3][60], atol=1e-5)


def test_everything_computed_again_by_a_method_says_the_same(case, model):
    rows = compare_reuse(
        model, PIECES, QUESTION, methods={"all": epic(40), "most": cacheblend(1.0), **METHODS}, answer_tokens=4
    )
    rows = {row["method"]: row for row in rows}
    assert rows["full"]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows["all"]["kl"] < 1e-6
    assert rows["most"]["kl"] < 1e-6
    assert rows["all"]["computed"] == pytest.approx(80 / 120)
    assert rows["naive paste"]["computed"] == rows["re-RoPE"]["computed"] == 0
    assert rows["naive paste"]["kl"] > rows["EPIC 32"]["kl"] > 0
    assert rows["all"]["answer"] == rows["full"]["answer"]


def test_the_first_layers_count_as_computed(case):
    made = cacheblend(0.5)(case)
    assert made.computed == pytest.approx(0.5 + 0.5 * 1 / 4, abs=0.01)


def test_block_attention_computes_the_last_piece_over_the_others(case):
    made = block_attention(case)
    assert made.computed == pytest.approx(40 / 120)
    assert torch.equal(made.kv.values[3][:80], rerope(case).kv.values[3][:80])
    assert not torch.allclose(made.kv.values[3][80:], rerope(case).kv.values[3][80:], atol=1e-3)


def test_rows_of_several_texts_are_means_with_their_spread():
    rows = [{"method": name, "computed": 0.5, "kl": kl} for name, kl in (("a", 1.0), ("b", 7.0), ("a", 3.0))]
    of_a, of_b = over_texts(rows)
    assert of_a == {"method": "a", "texts": 2, "computed": 0.5, "computed_sd": 0, "kl": 2, "kl_sd": 2**0.5}
    assert (of_b["texts"], of_b["kl"], of_b["kl_sd"]) == (1, 7, 0)


def test_seconds_are_the_share_computed_and_a_load():
    rows = [{"method": name, "computed": share} for name, share in (("a", 0.0), ("b", 0.25), ("full", 1.0))]
    timed = with_seconds(rows, 1000, Prefill(1e-3), load_s=0.1)
    assert [row["seconds"] for row in timed] == pytest.approx([0.1, 0.35, 1.0])


@pytest.mark.parametrize("chosen", [[5, 5], [9, 3], [-1], [120]])
def test_places_that_do_not_ascend_are_refused(case, model, chosen):
    with pytest.raises(ConfigError, match="must ascend within 0 to 119"):
        recomputed(model, case.whole, chosen)


def test_what_cannot_be_compared_is_refused(model):
    with pytest.raises(ConfigError, match="two pieces or more"):
        compare_reuse(model, PIECES[:1], QUESTION)
    with pytest.raises(ConfigError, match="at least one piece"):
        pasted([])
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    with pytest.raises(ConfigError, match="the rope of a gpt2 model is not known here"):
        rope_of(other)


def test_pasted_kv_says_its_tokens(case):
    kv = pasted(case.pieces)
    assert isinstance(kv, KV)
    assert kv.token_ids == case.whole.token_ids
    assert kv.num_positions == 120
