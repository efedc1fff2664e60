"""Prompts of which each head keeps some tokens, on a small random Llama."""

import pytest
import torch
import transformers

from kvlab import capture
from kvlab.connectors.transformers import from_cache
from kvlab.errors import ConfigError
from kvlab.reuse import PRESSES, compare_presses, kept, pressed, pruned
from kvlab.reuse.presses import knorm, num_kept, snapkv, streaming
from kvlab.reuse.rope import rope_of
from tests.support.llama import small_llama

TOKENS = [(7 * at * at + at) % 200 for at in range(80)]


@pytest.fixture(scope="module")
def model():
    return small_llama(3)


@pytest.fixture(scope="module")
def kv(model):
    return capture(model, TOKENS)


class KnormOfOthers:
    """A press with the interface of kvpress and its way to choose."""

    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio
        self.models = []

    def post_init_from_model(self, model):
        self.models.append(model)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[1] == keys.shape[2] == len(kwargs["cache_position"])
        assert module.rotary_emb is not None
        count = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        indices = (-keys.norm(dim=-1)).topk(count, dim=-1).indices[..., None].expand(-1, -1, -1, module.head_dim)
        return keys.gather(2, indices).contiguous(), values.gather(2, indices).contiguous()


def test_a_press_of_kvpress_keeps_what_it_chooses_in_each_head(model, kv):
    press = KnormOfOthers(0.75)
    theirs, ours = pressed(model, kv, press), pruned(model, kv, knorm, 0.25)
    assert press.models == [model]
    assert theirs.num_positions == 20
    assert max(float(error.max()) for error in theirs.diff(ours).values()) == 0
    assert not hasattr(model.model.layers[0].self_attn, "rotary_emb")


def test_each_heads_tokens_have_the_keys_of_a_shorter_prompt(model, kv):
    """In the first layer KV depends on token and place alone."""
    places = torch.stack([torch.randperm(80)[:20].sort().values for _ in range(6)]).view(3, 2, 20)
    part = kept(kv, places, rope_of(model))
    for head in range(2):
        alone = capture(model, [TOKENS[at] for at in places[0, head]])
        assert torch.allclose(part.keys[0][:, head], alone.keys[0][:, head], atol=1e-4)
        assert torch.equal(part.values[2][:, head], kv.values[2][places[2, head], head])
    assert len(part.token_ids) == 20


def test_streaming_keeps_the_first_and_the_latest_tokens_in_all_heads(model, kv):
    part = pruned(model, kv, streaming(4), 0.25)
    places = [*range(4), *range(64, 80)]
    assert part.token_ids == tuple(TOKENS[at] for at in places)
    same = kept(kv, places, rope_of(model))
    assert max(float(error.max()) for error in part.diff(same).values()) == 0


def test_snapkv_keeps_its_window_and_what_that_attends_to(model, kv):
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attention = model(torch.tensor([TOKENS]), output_attentions=True).attentions[0][0]
    model.set_attn_implementation("sdpa")
    liked = attention[:, -32:, :48].mean(1).view(2, 2, 48).mean(1)
    part = pruned(model, kv, snapkv(32, pooled=1), 0.5)
    for head in range(2):
        places = [*liked[head].topk(8).indices.sort().values.tolist(), *range(48, 80)]
        assert torch.equal(part.values[0][:, head], kv.values[0][places, head])
    with pytest.raises(ConfigError, match="more tokens than its window's 32, got 20"):
        pruned(model, capture(model, TOKENS[:20]), snapkv(32), 0.5)


def test_all_tokens_kept_say_what_the_whole_says(model):
    for row in compare_presses(model, TOKENS, [3, 5, 7], keep=1.0, answer_tokens=3):
        assert (row["kept"], row["same_token"]) == (1.0, 1.0), row
        assert row["kl"] < 1e-6


def test_a_row_for_each_press(model):
    presses = {**PRESSES, "theirs": KnormOfOthers(0.5)}
    rows = {row["press"]: row for row in compare_presses(model, TOKENS, [3, 5, 7], presses=presses, answer_tokens=3)}
    assert list(rows) == list(presses)
    assert {row["kept"] for row in rows.values()} == {0.5}
    assert rows["theirs"]["kl"] == rows["KNorm"]["kl"] > 0
    with pytest.raises(ConfigError, match="neither of them empty"):
        compare_presses(model, TOKENS, [])


class Hooked(KnormOfOthers):
    """As the base of kvpress's presses: what it keeps stands in the cache."""

    def forward_hook(self, module, _, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        kwargs = {"cache_position": torch.arange(layer.keys.shape[2]), **kwargs}
        keys, values = layer.keys, layer.values
        layer.keys, layer.values = self.compress(module, kwargs["hidden_states"], keys, values, output[1], kwargs)
        return output


class Two(Hooked):
    """One press behind another."""

    def forward_hook(self, *given):
        for press in (Hooked(0.5), Latest(0.5)):
            press.forward_hook(*given)


class Latest(Hooked):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys[:, :, keys.shape[2] // 2 :], values[:, :, keys.shape[2] // 2 :]


class InPasses(KnormOfOthers):
    def __call__(self, model):
        raise AssertionError("not called")


@pytest.mark.parametrize("press", [Hooked(0.5), Latest(0.5), Two(0.0)])
def test_transformers_keeps_the_same_tokens_with_the_same_press(model, kv, press):
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
    hooks = [
        layer.self_attn.register_forward_hook(press.forward_hook, with_kwargs=True) for layer in model.model.layers
    ]
    cache = transformers.DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([TOKENS]), past_key_values=cache)
    for hook, layer in zip(hooks, model.model.layers, strict=True):
        hook.remove()
        del layer.self_attn.rotary_emb
    theirs, ours = from_cache(cache, TOKENS), pressed(model, kv, press)
    assert len(theirs.values[0]) == ours.num_positions < 80
    for a, b in zip(theirs.values, ours.values, strict=True):
        for head in range(2):
            assert sorted(a[:, head].tolist()) == sorted(b[:, head].tolist())


class Turns(KnormOfOthers):
    def compress(self, *args):
        keys, values = super().compress(*args)
        return keys * 2, values


class Merges(KnormOfOthers):
    def compress(self, *args):
        keys, values = super().compress(*args)
        return keys, values + 1


class Pyramid(KnormOfOthers):
    def compress(self, module, *args):
        self.compression_ratio = 0.2 * (module.layer_idx + 1)
        return super().compress(module, *args)


class Hides(KnormOfOthers):
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        module.masked_key_indices = [0]
        return keys, values


@pytest.mark.parametrize(
    ("press", "words"),
    [
        (Turns(0.5), "Turns changes keys or values, and only the choice of tokens"),
        (Merges(0.5), "Merges changes keys or values"),
        (Pyramid(0.5), "layers keep 31 to 64 tokens, and an engine needs as many in each"),
        (Hides(0.5), "Hides hides tokens and drops none"),
        (InPasses(0.5), "InPasses runs the model in passes of its own"),
        (KnormOfOthers("half"), "KnormOfOthers raised TypeError: unsupported operand"),
    ],
)
def test_presses_that_an_engine_cannot_serve_are_refused(model, kv, press, words):
    with pytest.raises(ConfigError, match=words):
        pressed(model, kv, press)
    assert pressed(model, kv, KnormOfOthers(0.5)).num_positions == 40  # nothing of it is left in the model


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(model, kv, keep):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        pruned(model, kv, knorm, keep)


def test_places_of_other_heads_are_refused(model, kv):
    with pytest.raises(ConfigError, match=r"must be of all heads, or \(3, 2, kept\)"):
        kept(kv, torch.zeros(3, 1, 4, dtype=torch.int64), rope_of(model))


@pytest.mark.parametrize("press", [name for name in PRESSES if name != "SnapKV"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_presses_take_models_and_kv_of_16_bits(model, kv, press, dtype):
    angles = model.model.rotary_emb.inv_freq.clone()
    half = small_llama(3).bfloat16()
    half.model.rotary_emb.inv_freq = angles  # as from_pretrained with a dtype leaves them
    half.model.rotary_emb.original_inv_freq = angles
    same = kv.replaced(kv.tensor().to(dtype))
    assert pruned(half, same, PRESSES[press], 0.5).num_positions == 40
    assert pruned(half, same, snapkv(16), 0.29).num_positions == 23


class InPlace:
    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys.mul_(0), values


def wrong_scores(layer):
    layer.keys.zero_()
    return torch.full(layer.keys.shape[:2], float("nan"))


def test_a_press_that_writes_to_what_it_is_given_changes_nothing_of_its_callers(model, kv):
    before = kv.tensor().clone()
    with pytest.raises(ConfigError, match="changes keys or values"):
        pressed(model, kv, InPlace())
    with pytest.raises(ConfigError, match="with NaN"):
        pruned(model, kv, wrong_scores, 0.5)
    with pytest.raises(ConfigError, match=r"must be \[2, 80\] numbers"):
        pruned(model, kv, lambda layer: torch.ones(2, 60), 0.5)
    with pytest.raises(ConfigError, match="forward_hook or compress"):
        pressed(model, kv, None)
    assert torch.equal(kv.tensor(), before)


def test_a_share_keeps_as_many_tokens_as_kvpress_does_and_as_is_written():
    """kvpress is told what share to drop, and keeps int(tokens * (1 - ratio))."""
    for thousandths in range(1, 1000):
        ratio = thousandths / 1000
        for tokens in (1, 33, 40, 100, 200, 2875):
            assert num_kept(1 - ratio, tokens) == max(int(tokens * (1 - ratio)), 1)
    assert [num_kept(keep, 100) for keep in (0.1, 0.29, 0.57, 0.58, 1 - 0.9, 1)] == [10, 29, 57, 58, 9, 100]


def test_a_score_that_returns_nothing_is_refused(model, kv):
    with pytest.raises(ConfigError, match=r"a score must return a tensor, .* got NoneType"):
        pruned(model, kv, lambda layer: None, 0.5)
