"""What does each serde cost in quality, all bits counted? Real KV, the decoded KV in place, and the model goes on.

    python benchmarks/serde_quality.py MODEL SHAREGPT_JSON [--docs 12] [--out data/measured/serde_quality.csv]

Contexts of 768 tokens (three chunks of 256) are encoded and decoded; then the perplexity of the next 255 tokens and
64 greedily generated ones are taken with the decoded KV in the cache. The model computes in float32 on KV rounded
to bf16 (what an engine stores), so that nothing but the serde differs between rows. Tables of cachegen come from other
texts than are measured.
"""

import argparse
import math
from pathlib import Path

import torch
from serde_rows import ROOT, about, write
from serde_texts import code, sharegpt, token_rows
from transformers import AutoModelForCausalLM, DynamicCache

from kvlab.container import pack, packed_bytes
from kvlab.geometry import AXES
from kvlab.serde import Serde, get_serde
from kvlab.serde.cachegen import CacheGenSerde
from kvlab.serde.tables import LEVELS, profile
from kvlab.serde.wire import to_parts

CHUNK = 256
BATCH = 4
FIRST_KEPT = "first token kept"
PLAIN = [
    "naive", "lossless", "fp8", "fp8:k=channel,v=token", "int8", "int8:k=channel,v=token",
    "int4:k=token,v=token,group=64", "int4:k=channel,v=token,group=64", "int4:k=channel,v=token,group=32",
    "rotated4", "cachegen-lmcache",
]  # fmt: skip


@torch.inference_mode()
def captured(model: torch.nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    """KV of each row, bf16 (layers, tokens, kv_heads, kv, head_dim)."""
    found = []
    for row in rows:
        cache = DynamicCache()
        model(torch.tensor([row]), past_key_values=cache, logits_to_keep=1)
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (kv, heads, tokens, dim)
        found.append(torch.stack(pairs).permute(0, 3, 2, 1, 4).to(torch.bfloat16))
    return found


def cache_of(kvs: list[torch.Tensor]) -> DynamicCache:
    batch = torch.stack(kvs).float().permute(1, 4, 0, 3, 2, 5)  # (layers, kv, batch, heads, tokens, dim)
    return DynamicCache([(layer[0], layer[1]) for layer in batch])


@torch.inference_mode()
def judged(
    model: torch.nn.Module, kvs: list[torch.Tensor], rows: list[list[int]], context: int, greedy: int
) -> tuple[float, torch.Tensor]:
    """Mean negative log likelihood of what follows the context, and the greedy tokens (rows, greedy)."""
    total, count, made = 0.0, 0, []
    for start in range(0, len(rows), BATCH):
        ids = torch.tensor([row[context:] for row in rows[start : start + BATCH]])
        logits = model(ids, past_key_values=cache_of(kvs[start : start + BATCH])).logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    cache, token = cache_of(kvs), torch.tensor([[row[context]] for row in rows])
    for _ in range(greedy):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        made.append(token)
    return total / count, torch.cat(made, dim=1)


def coded(serde: Serde, kvs: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Decoded KV, and bits by kind with the container's header."""
    bits = dict.fromkeys(("payload", "scales", "tables", "anchors", "header"), 0)
    back = []
    for kv in kvs:
        pieces = []
        for piece in kv.split(CHUNK, dim=1):
            encoded = serde.encode(piece, AXES)
            for kind, count in encoded.bits().items():
                bits[kind] += count
            bits["header"] += 8 * packed_bytes(pack("k" * 64, *to_parts(encoded))) - sum(encoded.bits().values())
            pieces.append(serde.decode(encoded))
        back.append(torch.cat(pieces, dim=1))
    return back, bits


def in_chunk_tables(kvs: list[torch.Tensor], level: float) -> dict[str, int]:
    """Bits where each chunk is coded with tables made of itself and carries them."""
    total = dict.fromkeys(("payload", "scales", "tables", "anchors", "header"), 0)
    for kv in kvs:
        for piece in kv.split(CHUNK, dim=1):
            serde = CacheGenSerde(profile([piece], AXES, level))
            _, bits = coded(serde, [piece])
            total = {kind: total[kind] + bits[kind] for kind in total}
            total["tables"] += 8 * (serde.tables.nbytes() + serde.tables.unit.nbytes)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sharegpt", type=Path)
    parser.add_argument("--docs", type=int, default=12, help="a third of them code (default: %(default)s)")
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--greedy", type=int, default=64)
    parser.add_argument(
        "--only", default="", help="rows with this in their name (and naive), without tables in the chunk"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ablate", type=float, nargs="*", default=[0.125, 0.25])
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measured" / "serde_quality.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    num_code = args.docs // 3
    talks, sources = sharegpt(args.sharegpt, args.docs - num_code + 6), code(num_code + 2)
    length = args.context + args.continuation
    rows = token_rows(args.model, talks[: args.docs - num_code] + sources[:num_code], length)
    other = token_rows(args.model, talks[args.docs - num_code :] + sources[num_code:], args.context)
    kvs = captured(model, [row[: args.context] for row in rows])
    learned = [piece for kv in captured(model, other) for piece in kv.split(CHUNK, dim=1)]

    serdes: list[tuple[str, Serde]] = [(spec, get_serde(spec)) for spec in PLAIN]
    theta = float(model.config.rope_parameters["rope_theta"])
    centered = [f"centered:bits={bits},theta={theta:g}" for bits in (8, 4)]
    serdes += [(spec, get_serde(spec)) for spec in centered]
    serdes += [(f"cachegen:level={level}", CacheGenSerde(profile(learned, AXES, level))) for level in LEVELS]
    for level in args.ablate:
        serdes.append(
            (f"cachegen:level={level} without deltas", CacheGenSerde(profile(learned, AXES, level, deltas=False)))
        )
        serdes.append(
            (
                f"cachegen:level={level} without layer groups",
                CacheGenSerde(profile(learned, AXES, level, bins=(1.0, 1.0, 1.0))),
            )
        )
        serdes.append(
            (f"cachegen:level={level} one global table", CacheGenSerde(profile(learned, AXES, level, shared=True)))
        )

    for level in args.ablate:  # the first token is where attention sinks; an anchor keeps it at 8 bits
        plain = CacheGenSerde(profile(learned, AXES, level, deltas=False))
        serdes.append((f"cachegen:level={level} without deltas, {FIRST_KEPT}", plain))
    serdes = [(name, serde) for name, serde in serdes if name == "naive" or args.only in name]

    machine, out = about(), []
    elements = sum(kv.numel() for kv in kvs)
    base_nll, base_tokens = math.nan, torch.empty(0)

    def row(name: str, bits: dict[str, int], measured: dict[str, object]) -> None:
        all_bits = sum(bits.values())
        shares = {f"{kind}_bits": round(count / elements, 4) for kind, count in bits.items()}
        out.append(
            {
                "kind": name,
                "bits_per_element": round(all_bits / elements, 4),
                "ratio": round(16 * elements / all_bits, 4),
                **shares,
                **measured,
            }
        )
        print(
            {
                key: out[-1].get(key)
                for key in (
                    "kind",
                    "bits_per_element",
                    "key_error",
                    "value_error",
                    "perplexity_rise",
                    "greedy_agreement",
                )
            },
            flush=True,
        )

    where = {"num_tokens": args.docs * args.context, "chunk_tokens": CHUNK, "model": Path(args.model).name, **machine}
    for name, serde in serdes:
        back, bits = coded(serde, kvs)
        if FIRST_KEPT in name:
            for decoded, kv in zip(back, kvs, strict=True):
                decoded[:, 0] = kv[:, 0]
                bits["anchors"] += 16 * kv[:, 0].numel()
        nll, tokens = judged(model, back, rows, args.context, args.greedy)
        if name == "naive":
            base_nll, base_tokens = nll, tokens
        same = tokens == base_tokens
        errors = []
        for half in (0, 1):
            distance = sum(
                float((a[:, :, :, half].double() - b[:, :, :, half].double()).square().sum())
                for a, b in zip(kvs, back, strict=True)
            )
            errors.append(math.sqrt(distance / sum(float(kv[:, :, :, half].double().square().sum()) for kv in kvs)))
        row(name, bits, {
            "key_error": round(errors[0], 6), "value_error": round(errors[1], 6), "perplexity": round(math.exp(nll), 5),
            "perplexity_rise": round(math.exp(nll - base_nll) - 1, 6),
            "greedy_agreement": round(float(same.float().mean()), 4),
            "greedy_first_difference": round(float((same.int().cumprod(1).sum(1)).float().mean()), 2), **where,
        })  # fmt: skip
        write(args.out, out)
    for level in args.ablate if not args.only else ():
        whole = next(entry for entry in out if entry["kind"] == f"cachegen:level={level}")
        quality = {key: whole[key] for key in whole if "bits" not in key and key not in ("kind", "ratio")}
        row(f"cachegen:level={level} tables in the chunk", in_chunk_tables(kvs, level), quality)
    write(args.out, out)


if __name__ == "__main__":
    main()
