"""Ropes of many kinds of model: what turns keys is what the model itself does, or it is refused."""

from dataclasses import replace

import pytest
import torch
import transformers

from kvlab import capture
from kvlab.errors import ConfigError
from kvlab.reuse import compare_reuse, kept, pasted, pruned, recomputed, turned
from kvlab.reuse.presses import snapkv
from kvlab.reuse.rope import rope_of

SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THETA = {"rope_theta": 10000.0}
TWO_KINDS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
TOKENS = [(7 * at * at + at) % 200 for at in range(60)]

LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 1, "first_k_dense_replace": 4,
}  # fmt: skip
KNOWN = {
    "Llama": {},
    "Llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}},
    "Llama llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256, "rope_theta": 500000.0,
        }
    },
    "Llama yarn": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, **THETA}
    },
    "Mistral": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Gemma": {"head_dim": 32},
    "Gemma2": {"head_dim": 32, "sliding_window": 16},
    "Gemma3Text": {"head_dim": 32, **TWO_KINDS},
    "Phi": {"partial_rotary_factor": 0.5},
    "Phi3": {"partial_rotary_factor": 0.5},
    "SmolLM3": {"no_rope_layers": [1, 1, 1, 0]},
    "Olmo2": {},
    "GPTNeoX": {},
}  # fmt: skip
REFUSED = {
    "Llama dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}}, "model is dynamic: its"),
    "Phi3 longrope": (
        {
            "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 512, "factor": 4.0, **THETA,
            }
        },
        "model is longrope: its",
    ),
    "Cohere": ({}, "layer 0 of this cohere model does not turn keys as known here"),
    "Glm": ({"head_dim": 16}, "layer 0 of this glm model does not turn keys as known here"),
    "Bloom": ({}, "the rope of a bloom model is not known here"),
    "DeepseekV2": (LATENT, "layer 0 of this deepseek_v2 model keeps values that change with their place"),
    "DeepseekV3": (LATENT, "layer 0 of this deepseek_v3 model keeps values that change with their place"),
    "MiniCPM3": (LATENT, "layer 0 of this minicpm3 model keeps values that change with their place"),
}  # fmt: skip


def made(name, settings):
    torch.manual_seed(0)
    kind = name.split()[0]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()


def worst(kv, other):
    return max(float(error.max()) for error in kv.diff(other).values())


@pytest.mark.parametrize("name", KNOWN)
def test_pieces_are_turned_and_computed_again_as_the_model_does(name):
    """In the first layer KV depends on token and place alone. Layers with a window of 16 tokens see no further."""
    model = made(name, KNOWN[name])
    whole = capture(model, TOKENS)
    pieces = [capture(model, TOKENS[:25]), capture(model, TOKENS[25:])]
    context = pasted([pieces[0], turned(pieces[1], 25, rope_of(model))])
    assert torch.allclose(context.keys[0], whole.keys[0], atol=1e-4)
    assert torch.allclose(pasted(pieces).keys[0], whole.keys[0], atol=1e-2) == (not rope_of(model)[0].any())
    assert worst(whole, recomputed(model, context, range(60))) < 1e-4
    assert worst(whole, recomputed(model, whole, [3, 20, 41, 59])) < 1e-4


def test_layers_that_know_no_position_are_not_turned():
    rope = rope_of(made("SmolLM3", KNOWN["SmolLM3"]))
    assert rope.any(dim=1).tolist() == [True, True, True, False]


def test_the_angles_are_those_of_the_models_own_rotary_embedding():
    model = made("Llama llama3", KNOWN["Llama llama3"])
    cos, _ = model.model.rotary_emb(torch.ones(1, dtype=torch.float64), torch.tensor([[700]]))
    assert torch.allclose((700 * rope_of(model)[2]).cos(), cos[0, 0, :8], atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_with_the_reason(name):
    settings, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        rope_of(made(name, settings))


@pytest.mark.parametrize("name", ["Qwen3", "Gemma3Text", "Phi3", "SmolLM3"])
def test_presses_score_the_queries_that_the_model_makes(name):
    """SnapKV keeps what the last tokens attend to: as the model's own attention says."""
    model = made(name, KNOWN[name])
    kv = capture(model, TOKENS)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([TOKENS]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    layer = 3  # which sees everything in each of them
    liked = attentions[layer][0, :, -32:, :28].mean(1).view(2, 2, 28).mean(1)
    part = pruned(model, kv, snapkv(32, pooled=1), 0.75)
    for head in range(2):
        places = [*liked[head].topk(13).indices.sort().values.tolist(), *range(28, 60)]
        assert torch.equal(part.values[layer][:, head], kv.values[layer][places, head])


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.bfloat16().float()])
def test_angles_that_a_cast_has_rounded_are_refused(cast):
    with pytest.raises(ConfigError, match="rounded to 16 bits"):
        rope_of(cast(made("Llama", {})))


@pytest.mark.parametrize(("theta", "head_dim"), [(65536.0, 32), (2.0**32, 64), (1.0, 16)])
def test_angles_that_are_powers_of_two_are_not_rounded(theta, head_dim):
    rope = {"rope_type": "default", "rope_theta": theta}
    assert rope_of(made("Llama", {"head_dim": head_dim, "rope_parameters": rope})).any()


def test_angles_that_change_at_far_places_are_refused():
    model = made("Llama", {"max_position_embeddings": 4096})
    as_it_is = model.model.rotary_emb.forward

    def changed(x, position_ids):
        return as_it_is(x, torch.where(position_ids > 2000, position_ids * 2, position_ids))

    model.model.rotary_emb.forward = changed
    with pytest.raises(ConfigError, match="up to place 4091"):
        rope_of(model)


def test_angles_that_change_are_asked_for_again():
    model = made("Llama", {})
    before = rope_of(model)
    model.model.rotary_emb.inv_freq *= 0.5
    assert torch.equal(rope_of(model), before / 2)


def test_what_does_not_fit_together_is_refused():
    model, other = made("Llama", {}), made("Llama", {"num_key_value_heads": 4})
    kv = capture(model, TOKENS)
    with pytest.raises(ConfigError, match="same layers, KV heads"):
        pasted([kv, capture(other, TOKENS)])
    with pytest.raises(ConfigError, match="whole numbers"):
        kept(kv, [0.5], rope_of(model))
    with pytest.raises(ConfigError, match="head_dim and dtype"):
        pasted([kv, kv.replaced(kv.tensor().bfloat16())])
    with pytest.raises(ConfigError, match="names 1 of 60"):
        pruned(model, replace(kv, token_ids=(1,)), snapkv(), 0.5)
    with pytest.raises(ConfigError, match=r"call model.eval\(\)"):
        rope_of(made("Llama", {}).train())


@pytest.mark.parametrize(
    ("by", "rope", "words"),
    [
        (float("nan"), None, "must be whole numbers, got torch.float32"),
        (0.5, None, "must be whole numbers, got torch.float32"),
        ("a", None, "must be whole numbers, got 'a'"),
        (1, torch.ones(8, dtype=torch.bfloat16), "must be the float64 tensor of radians .* got torch.bfloat16"),
        (1, torch.ones(64).double(), "a rope of 64 pairs turns 128 channels, but heads have 16"),
        (1, torch.full((8,), float("nan")), "must be finite radians"),
    ],
)
def test_keys_are_turned_by_whole_places_and_a_rope_that_fits(by, rope, words):
    model = made("Llama", {})
    with pytest.raises(ConfigError, match=words):
        turned(capture(model, TOKENS), by, rope_of(model) if rope is None else rope)


def test_what_is_no_model_and_no_token_of_it_is_refused():
    for other in (None, "x", torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=f"a causal model of transformers, .* got {type(other).__name__}"):
            rope_of(other)
    model = made("Llama", {})
    for token in (-2, 200, 1.5, "a"):
        with pytest.raises(ConfigError, match=f"whole numbers from 0 to 199, got {token!r}"):
            compare_reuse(model, [[1, token], [5]], [4])
        with pytest.raises(ConfigError, match=f"whole numbers from 0 to 199, got {token!r}"):
            compare_reuse(model, [[1], [5]], [4, token])
