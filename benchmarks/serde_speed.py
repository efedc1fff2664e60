"""How fast is each serde on one core, and below which link bandwidth does it pay?

    python benchmarks/serde_speed.py MODEL SHAREGPT_JSON [--out data/measured/serde_speed.csv]

A 256-token chunk of real KV (bf16), and the same chunk as an engine's opaque pages; median of the repeats; GB/s of
*raw* KV. The ceiling is a copy of the same bytes in the same run. A serde of ratio r that decodes at D shortens a load
over a link of B bytes a second if r > 1 and, done one after the other, B < D * (r - 1) / r; pipelined, B < D.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from serde_rows import ROOT, about, write
from serde_texts import sharegpt, token_rows

from kvlab.connectors.transformers import capture, load_model
from kvlab.geometry import AXES
from kvlab.serde import get_serde
from kvlab.serde.cachegen import CacheGenSerde
from kvlab.serde.tables import profile

SPECS = ["naive", "lossless", "fp8", "int8", "int8:k=channel,v=token", "int4", "rotated4", "cachegen-lmcache"]


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sharegpt", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measured" / "serde_speed.csv")
    args = parser.parse_args()
    model = load_model(args.model)
    texts = token_rows(args.model, sharegpt(args.sharegpt, 4), 1024)
    kvs = [capture(model, ids).tensor() for ids in texts]
    torch.set_num_threads(1)
    kv = kvs[0][:, 256:512].contiguous()
    pages = kv.unflatten(1, (-1, 32)).permute(1, 0, 2, 3, 4, 5).contiguous().view(torch.uint8).reshape(8, len(kv), -1)
    learned = [piece for one in kvs[1:] for piece in one.split(256, dim=1)]
    serdes = [(spec, get_serde(spec)) for spec in SPECS]
    serdes += [
        (f"cachegen:level={level}", CacheGenSerde(profile(learned, AXES, level))) for level in (0.125, 0.25, 1.0)
    ]
    cases = [(name, serde, kv, AXES) for name, serde in serdes]
    cases.append(("lossless on opaque pages", get_serde("lossless"), pages, ("blocks", "layers", "page_bytes")))
    num_bytes, rows = kv.numel() * kv.element_size(), []
    for name, serde, tensor, axes in cases:
        encoded, out, copy = serde.encode(tensor, axes), torch.empty_like(tensor), tensor.clone()
        ceiling = num_bytes / seconds(lambda: copy.copy_(tensor), args.repeats) / 1e9
        encode = num_bytes / seconds(lambda: serde.encode(tensor, axes), args.repeats) / 1e9
        decode = num_bytes / seconds(lambda: serde.decode(encoded, out), args.repeats) / 1e9
        ratio = 8 * num_bytes / sum(encoded.bits().values())
        serial = decode * (ratio - 1) / ratio if ratio > 1.001 else 0.0
        rows.append({
            "kind": name, "ratio": round(ratio, 4), "encode_gb_s": round(encode, 3), "decode_gb_s": round(decode, 3),
            "copy_gb_s": round(ceiling, 3), "decode_of_copy": round(decode / ceiling, 4),
            "break_even_serial_gb_s": round(serial, 3),
            "break_even_pipelined_gb_s": round(decode if ratio > 1.001 else 0.0, 3),
            "threads": 1, "chunk_bytes": num_bytes, "repeats": args.repeats, "model": Path(args.model).name, **about(),
        })  # fmt: skip
        print(
            {key: rows[-1][key] for key in ("kind", "ratio", "encode_gb_s", "decode_gb_s", "break_even_serial_gb_s")},
            flush=True,
        )
    write(args.out, rows)


if __name__ == "__main__":
    main()
