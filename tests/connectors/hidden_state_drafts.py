"""Small models with drafts that read hidden states: EAGLE and MTP heads that nearly always agree with the model.

At each token such a draft is given the model's hidden state there, and the next token. These pick the next token alone
and compute the model's own layers with it, so what they lack of the model is its first token.
"""

import json
from pathlib import Path

import torch

HIDDEN, VOCABULARY = 128, 49152
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "initializer_range": 0.2, "rms_norm_eps": 1e-6,
}  # fmt: skip


def _save(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> str:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def _picks(which: int) -> torch.Tensor:
    """A projection of two vectors to one of them, with a little of the other: the KV is of both."""
    eye, little = torch.eye(HIDDEN), 0.001 * torch.eye(HIDDEN)
    return torch.cat([eye, little] if which == 0 else [little, eye], dim=1)


def eagle(folder: Path) -> dict:
    """A Llama of two layers, and an EAGLE head of three: the first adds nothing, as EAGLE gives it no norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES))
    model.save_pretrained(folder / "model")
    own = model.state_dict()
    head = {"fc.weight": _picks(0), "embed_tokens.weight": own["model.embed_tokens.weight"]}
    for name, tensor in own.items():
        _, found, rest = name.partition("model.layers.")
        if not found:
            continue
        number, _, of_layer = rest.partition(".")
        head[f"layers.{int(number) + 1}.{of_layer}"] = tensor
        if number == "0" and of_layer != "input_layernorm.weight":
            adds = of_layer in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            head[f"layers.0.{of_layer}"] = torch.zeros_like(tensor) if adds else tensor
    config = LlamaConfig(num_hidden_layers=3, architectures=["LlamaForCausalLM"], **SIZES).to_dict()
    draft = _save(folder / "draft", config, head)
    return {"model": str(folder / "model"), "speculative_config": {"method": "eagle", "model": draft}}


def mtp(folder: Path) -> dict:
    """A MiMo of one layer with one MTP layer, which is given the token's embedding scaled to a norm of one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=1, **sizes))
    tensors = dict(plain.state_dict())
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = embeddings / embeddings.pow(2).mean(-1, keepdim=True).sqrt()
    layer = "model.mtp_layers.0."
    for name in list(tensors):
        if name.startswith("model.layers.0."):
            tensors[layer + name.removeprefix("model.layers.0.")] = tensors[name]
    ones = torch.ones(HIDDEN)
    tensors |= {f"{layer}{name}_layernorm.weight": ones.clone() for name in ("token", "hidden", "final")}
    tensors[f"{layer}input_proj.weight"] = _picks(1)
    config = plain.config.to_dict() | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return {"model": _save(folder / "mimo", config, tensors), "speculative_config": {"method": "mtp"}}
