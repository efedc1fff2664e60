"""What do serdes lose of keys that carry a large constant? Real keys, with a bias as Qwen 2.5 has it.

    python benchmarks/serde_constants.py MODEL [--out data/measured/serde_constants.csv]

Qwen2.5-7B adds a bias to K, of norm 605 in its first layer and 921 in its last, and RoPE turns it with the position.
MODEL's keys (bf16, after RoPE, chunks of 256 tokens of Python source) get a bias of these norms in their first and last
layer, in a random direction, turned as RoPE turns it; other layers stay. `key_error` is the error of decoded keys in
units of what differs between tokens: keys turned back, without their mean. Tables of cachegen come from the biased keys
of other texts. A bias that MODEL was not trained with changes what it says, so no perplexity is taken.
"""

import argparse
from pathlib import Path

import torch
from serde_quality import captured
from serde_rows import ROOT, about, write
from serde_texts import code, token_rows
from transformers import AutoModelForCausalLM

from kvlab.geometry import AXES
from kvlab.serde import Serde, get_serde
from kvlab.serde.cachegen import CacheGenSerde
from kvlab.serde.centered import centre, constants, rope_frequencies, rotated
from kvlab.serde.tables import profile

CHUNK = 256
NORMS = (605.0, 921.0)  # of the first and the last layer
KINDS = ("fp8", "int8", "int8:k=channel,v=token", "int4", "int4:k=token,v=token,group=64", "rotated4",
         "cachegen-lmcache")  # fmt: skip


def biased(kv: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """`kv` with a bias in K of its first and last layer."""
    out = kv.float()
    for layer, norm, seed in ((0, NORMS[0], 0), (-1, NORMS[1], 1)):
        bias = torch.randn(kv.shape[2], kv.shape[4], generator=torch.Generator().manual_seed(seed))
        bias *= norm / bias.norm()
        turned = rotated(bias.double().expand(kv.shape[1], -1, -1), frequencies, "half", 1.0)
        out[layer, :, :, 0] += turned.float()
    return out.to(torch.bfloat16)


def key_errors(serde: Serde, kvs: list[torch.Tensor], frequencies: torch.Tensor) -> tuple[list[float], float]:
    """Errors of the first and last layer's keys, and bits an element of all."""
    lost, kept, bits, elements = [0.0, 0.0], [0.0, 0.0], 0, 0
    for kv in kvs:
        for piece in kv.split(CHUNK, dim=1):
            encoded = serde.encode(piece, AXES)
            bits, elements = bits + sum(encoded.bits().values()), elements + piece.numel()
            back = serde.decode(encoded)
            for at, layer in enumerate((0, -1)):
                keys = piece[layer, :, :, 0].double()
                turned = rotated(keys, frequencies, "half", -1.0)
                lost[at] += float((back[layer, :, :, 0].double() - keys).square().sum())
                kept[at] += float((turned - centre(turned)).square().sum())
    return [(one / other) ** 0.5 for one, other in zip(lost, kept, strict=True)], bits / elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--docs", type=int, default=4)
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measured" / "serde_constants.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    theta = float(model.config.rope_parameters["rope_theta"])
    rows = token_rows(args.model, code(args.docs + 2), args.context)
    plain = captured(model, rows)
    frequencies = rope_frequencies(plain[0].shape[-1], theta)
    large = [biased(kv, frequencies) for kv in plain]
    names = [*KINDS, f"centered:bits=8,theta={theta:g}", f"centered:bits=4,theta={theta:g}"]
    machine, out = about(), []
    for given, kvs in (("plain", plain), ("with a bias", large)):
        learned = [piece for kv in kvs[args.docs :] for piece in kv.split(CHUNK, dim=1)]
        serdes = [(name, get_serde(name)) for name in names]
        serdes.append(("cachegen:level=0.25", CacheGenSerde(profile(learned, AXES, 0.25))))
        measured = kvs[: args.docs]
        sizes = torch.tensor([constants(piece, AXES, frequencies) for kv in measured for piece in kv.split(CHUNK, 1)])
        for name, serde in serdes:
            (first, last), bits = key_errors(serde, measured, frequencies)
            row = {
                "keys": given, "kind": name, "bits_per_element": round(bits, 3), "key_error_first": round(first, 4),
                "key_error_last": round(last, 4), "constant_first": round(float(sizes[:, 0].mean()), 2),
                "constant_last": round(float(sizes[:, -1].mean()), 2), "chunk_tokens": CHUNK,
                "num_tokens": args.docs * args.context, "model": Path(args.model).name, **machine,
            }  # fmt: skip
            out.append(row)
            print({key: row[key] for key in list(row)[:7]}, flush=True)
    write(args.out, out)


if __name__ == "__main__":
    main()
