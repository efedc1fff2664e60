"""How fast do `lossless` and the coder of `cachegen` decode on a GPU, and are they right?

    python benchmarks/serde_gpu.py [--out data/measured/serde_gpu.csv]   # needs torch, triton and numpy only

Chunks of 256 tokens in the shape of Qwen2.5-7B (28 layers, 4 KV heads of 128, bf16: 14 MiB), numbers normal with
channels of different size. Each decoder is first compared with its CPU reference, then timed with CUDA events
(median of the repeats), one chunk at a time and many; GB/s of *raw* KV. The ceiling is a device copy of the same
bytes. Payloads lie on the GPU already; `h2d_gb_s` is the pinned copy over the bus, which must be beaten.
"""

import argparse
import csv
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton

from kvlab.geometry import AXES
from kvlab.serde import rans, rans_triton
from kvlab.serde.lossless import LosslessSerde
from kvlab.serde.lossless_triton import decode_on_device, decode_parts
from kvlab.serde.window import Window

try:
    from kvlab.serde import rans_fast as coder
except ImportError:
    coder = rans  # type: ignore[misc]

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (28, 256, 4, 2, 128)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        work()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def kv_like(seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-2, 3, SHAPE[-1:], generator=source).float())
    return (torch.randn(SHAPE, generator=source) * spread).to(torch.bfloat16)


def lossless_rows(repeats: int) -> list[dict[str, object]]:
    kv = kv_like(0)
    encoded = LosslessSerde().encode(kv, AXES)
    back = decode_on_device(encoded, "cuda")
    assert back.cpu().view(torch.int16).equal(kv.view(torch.int16)), "lossless on the GPU differs from its input"
    window = Window.of(encoded.shape, encoded.axes, kv.numel(), encoded.params["rows"], encoded.params["period"])
    ratio = 16 * kv.numel() / sum(encoded.bits().values())
    rows: list[dict[str, object]] = []
    for chunks in (1, 4, 16):
        copies = [{name: part.cuda().clone() for name, part in encoded.parts.items()} for _ in range(chunks)]
        outs = [torch.empty(kv.shape, dtype=torch.int16, device="cuda") for _ in range(chunks)]
        sources = [torch.empty_like(out) for out in outs]

        def decode() -> None:
            for parts, out in zip(copies, outs, strict=True):
                decode_parts(parts, window, out)

        def copy() -> None:
            for out, source in zip(outs, sources, strict=True):
                out.copy_(source)

        rows.append(
            row(
                "lossless decode",
                chunks,
                ratio,
                kv.nbytes * chunks,
                milliseconds(decode, repeats),
                milliseconds(copy, repeats),
            )
        )
        if chunks == 16:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                decode()
            rows.append(
                row(
                    "lossless decode, CUDA graph",
                    chunks,
                    ratio,
                    kv.nbytes * chunks,
                    milliseconds(graph.replay, repeats),
                    milliseconds(copy, repeats),
                )
            )
            graph.replay()  # the timing above ended with the plain copy into the same outputs
            assert all(out.cpu().equal(kv.view(torch.int16)) for out in outs)
    return rows


def cachegen_rows(repeats: int) -> list[dict[str, object]]:
    """The coder at symbols of a given spread, each channel with its own table, as in `cachegen`."""
    layers, tokens, heads, _, dim = SHAPE
    planes, channels = 2 * layers, heads * dim
    rows: list[dict[str, object]] = []
    for spread in (1.0, 4.0):  # in bins: about levels 1 and 0.25
        source = np.random.default_rng(0)
        middle = int(5 * spread)
        symbols = np.clip(np.rint(source.normal(middle, spread, (planes, tokens, channels))), 0, 2 * middle).astype(
            np.uint8
        )
        num_symbols = 2 * middle + 2
        index = np.arange(planes * channels, dtype=np.int32).reshape(planes, channels)
        flat = index[:, None].astype(np.int64) * num_symbols + symbols
        counts = np.bincount(flat.reshape(-1), minlength=index.size * num_symbols).reshape(-1, num_symbols)
        model = rans.Model.of(index, rans.normalized(counts))
        lanes = rans.num_lanes(channels, 8)
        words, lengths = coder.encode(symbols, model, lanes)
        starts, _ = rans.lane_bounds(words, lengths, model, tokens)
        ratio = 16 * symbols.size / (16 * words.size + 16 * lengths.size)
        step = torch.rand(planes, 1, channels, device="cuda")
        for chunks in (1, 8, 32):
            many = torch.from_numpy(words.view(np.int16)).cuda().repeat(chunks)
            first = torch.cat([torch.from_numpy(starts) + chunk * words.size for chunk in range(chunks)]).cuda()
            table = torch.from_numpy(model.index).cuda().repeat(chunks, 1)
            cum = torch.from_numpy(model.cum.view(np.int16)).cuda()

            def decode() -> tuple[torch.Tensor, torch.Tensor]:
                return rans_triton.decode_on_device(many, first, table, cum, tokens)

            def whole() -> torch.Tensor:
                found, _ = decode()
                return (found.view(chunks, planes, tokens, channels) - middle).mul(step).to(torch.bfloat16)

            back, ended = decode()
            assert bool((ended[..., 0] == 1 << 16).all()), "a lane did not end where it began"
            for chunk in range(chunks):
                assert np.array_equal(back[chunk * planes : (chunk + 1) * planes].cpu().numpy(), symbols), (
                    "symbols differ"
                )
            raw = torch.empty(2 * symbols.size * chunks, dtype=torch.uint8, device="cuda")
            ceiling = milliseconds(lambda: raw.clone(), repeats)
            for name, work in (("cachegen coder", decode), ("cachegen coder and scale", whole)):
                rows.append(
                    row(
                        f"{name}, spread {spread:g} bins",
                        chunks,
                        ratio,
                        raw.numel(),
                        milliseconds(work, repeats),
                        ceiling,
                    )
                )
    return rows


def row(kind: str, chunks: int, ratio: float, raw_bytes: int, ms: float, copy_ms: float) -> dict[str, object]:
    return {
        "kind": kind, "chunks": chunks, "ratio": round(ratio, 4), "raw_bytes": raw_bytes, "ms": round(ms, 4),
        "gb_s": round(raw_bytes / ms / 1e6, 2), "device_copy_gb_s": round(raw_bytes / copy_ms / 1e6, 2),
    }  # fmt: skip


def bus_gb_s() -> float:
    pinned = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda")
    return pinned.numel() / milliseconds(lambda: target.copy_(pinned, non_blocking=True), 10) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measured" / "serde_gpu.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU; the decoders' tests run anywhere")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    about = {
        "h2d_gb_s": round(bus_gb_s(), 2), "machine": torch.cuda.get_device_name(), "repeats": args.repeats,
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}",
        "commit": commit, "command": "python benchmarks/serde_gpu.py",
    }  # fmt: skip
    rows = [{**one, **about} for one in lossless_rows(args.repeats) + cachegen_rows(args.repeats)]
    for one in rows:
        ceilings = f"(copy {one['device_copy_gb_s']}, bus {one['h2d_gb_s']})"
        print(f"{one['kind']:42} {one['chunks']:>3} chunks  {one['gb_s']:>8} GB/s raw  {ceilings}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
