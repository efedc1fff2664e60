"""How fast do codecs move KV between an engine's pages on a GPU and host memory, and are their bytes the twins'?

    python benchmarks/gpu_codecs.py [--rows data/measured/gpu_codecs.csv]
    python benchmarks/gpu_codecs.py --check-only [--small]     # with TRITON_INTERPRET=1 on a CPU, too

First every kind is held against its twin in torch, bit by bit: encoded bytes, decoded pages, and all that must stay as
it was, for several page layouts, dtypes, heads, widths and lengths; then numbers at a dtype's end, NaN, and broken
objects. Then, in the layout of Qwen2.5-7B in vLLM (28 layers, 4 KV heads of 128, pages of 16 tokens and 32 KiB, chunks
of 256 tokens: 14 MiB), it times with CUDA events, medians of `--repeats`, in GB/s of raw KV:

    encode, decode   pages to encoded bytes on the GPU and back; beside them a copy of the pages on the GPU
    save, load       pages to pinned host memory and back, through the ring; beside them kvlab's plain transfer
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton

from kvlab.codecs import PageCodec
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.lossless import LosslessCodec
from kvlab.codecs.rotated import RotatedCodec
from kvlab.codecs.scaled import ScaledCodec
from kvlab.codecs.staging import Codec, Staging
from kvlab.errors import FormatError
from kvlab.machine.provenance import append_rows
from kvlab.paged import PageMap, TypedPages, page_layout
from kvlab.paged.known import known_maps
from kvlab.serde import get_serde

KINDS = ("int8", "int8:k=channel,v=token", "fp8", "int4", "lossless")
SPECS = (*KINDS, "int8:k=channel,v=channel,group=7", "fp8:k=channel,group=24", "int4:k=token,v=channel,group=0",
         "int4:k=token,group=7", "int8:group=24", "rotated4")  # fmt: skip
SHAPES = (("NHC", 2, 64), ("HNC", 1, 128), ("NHD", 3, 80), ("HND", 16, 64), ("CPU vec", 2, 96), ("CPU amx", 2, 64),
          ("HNC", 4, 256), ("latents", 1, 576))  # fmt: skip
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 17, 40, 64, 131, 256)
BLOCK, LAYERS = 16, 2
QWEN = ("NHC", 4, 128, 28)  # layout, heads, width, layers
MIB = (14, 28, 64, 128, 512)
BUDGET_S = 90  # of timing: what is left then is left out, and named


def map_of(name: str, heads: int, dim: int, element: torch.dtype, slack: int = 0) -> PageMap:
    latent = name == "latents"
    size = BLOCK * heads * (1 if latent else 2) * dim * element.itemsize + slack
    found = known_maps(
        block_tokens=BLOCK, kv_heads=heads, head_dim=dim, element=element, page_bytes=size, latent=latent
    )
    return {one.name: one for one in found}[name]


class Engine:
    """Pages on a device, of random bytes."""

    def __init__(
        self, page_map: PageMap, num_blocks: int, device: str, num_layers: int = LAYERS, seed: int = 0
    ) -> None:
        source = torch.Generator(device=device).manual_seed(seed)
        shape = (num_blocks, page_map.page_bytes)
        self.caches = {
            f"layer.{at}": torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=source)
            for at in range(num_layers)
        }
        layout = page_layout(
            self.caches, num_blocks=num_blocks, page_bytes=dict.fromkeys(self.caches, page_map.page_bytes), name="LBHNC"
        )
        self.typed = TypedPages(layout, page_map, num_layers)

    def pages(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.stack([cache[list(block_ids)] for cache in self.caches.values()], dim=1).cpu()

    def all(self) -> torch.Tensor:
        return torch.stack([cache.cpu() for cache in self.caches.values()])


def kv_like(shape: Sequence[int], element: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers whose channels differ in size."""
    source = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-3, 4, shape[-1:], generator=source).float())
    return (torch.randn(tuple(shape), generator=source) * spread).to(element)


def codec_of(spec: str, addresses: Addresses) -> Codec:
    if spec == "lossless":
        return LosslessCodec(addresses)
    return RotatedCodec(get_serde(spec), addresses) if spec == "rotated4" else ScaledCodec(get_serde(spec), addresses)


def cases(small: bool) -> Iterator[tuple[str, tuple[str, int, int], torch.dtype, int]]:
    """Kinds with layouts, dtypes and lengths, each value of each with many of the others: one combination in 41,
    as each has programs to compile; `small`: fewer and smaller ones."""
    at = 0
    for spec in SPECS:
        for shape in SHAPES:
            for element in FLOATS:
                for tokens in TOKENS:
                    if spec == "lossless" and (element != torch.bfloat16 or tokens < 128):
                        continue
                    at += 1
                    costly = shape[1] * shape[2] * tokens > 128 * 64
                    packed = shape[0] == "CPU amx" and tokens == 17 and spec in ("int4", "int8")
                    chosen = at % 41 == 0 or packed or (spec == "lossless" and shape[1] < 4)
                    if small:
                        chosen = (
                            (at % 37 == 0 and not costly)
                            or (packed and element == torch.bfloat16)
                            or (spec == "lossless" and shape[1:] == (1, 128))
                        )
                    if chosen:
                        yield spec, shape, element, tokens


def check(spec: str, shape: tuple[str, int, int], element: torch.dtype, tokens: int, device: str, seed: int) -> None:
    """Two objects through the ring, against the twin's."""
    page_map = map_of(*shape, element, slack=64 * (seed % 2))
    count = -(-tokens // BLOCK)
    objects = [list(range(count))[::-1], list(range(count + 2, 2 * count + 2))]
    engine = Engine(page_map, 2 * count + 3, device)
    for at, block_ids in enumerate(objects):
        engine.typed.write(kv_like(page_map.shape(LAYERS, tokens), element, seed + at).to(device), block_ids)
    twin = PageCodec(get_serde(spec), page_map)
    wanted = [twin.encode(engine.pages(block_ids), tokens) for block_ids in objects]

    codec = codec_of(spec, Addresses(engine.typed))
    size = 2 * codec.plan(tokens).num_bytes
    staging = Staging(codec, torch.device(device), size, depth=2)
    host = torch.full((size,), 0xEE, dtype=torch.uint8, pin_memory=device == "cuda")
    if seed % 4 == 0 and tokens >= BLOCK:
        before = engine.all()
        staging.prepare()
        assert engine.all().equal(before), "the preparation changed a page"
    found = staging.save(objects, tokens, host).encoded()
    for got, want in zip(found, wanted, strict=True):
        assert got is not None
        assert (got.serde, got.shape, got.dtype, got.params) == (want.serde, want.shape, want.dtype, want.params)
        assert got.parts.keys() == want.parts.keys()
        for name, part in want.parts.items():
            assert bits(got.parts[name]).equal(bits(part)), f"part {name} differs from the twin's"

    other = Engine(page_map, 2 * count + 3, device, seed=1)
    expected = Engine(page_map, 2 * count + 3, device, seed=1)
    for want, block_ids in zip(wanted, objects, strict=True):
        expected.typed.write(twin.serde.decode(want).to(device), block_ids)
    staging = Staging(codec_of(spec, Addresses(other.typed)), torch.device(device), size, depth=2)
    assert staging.load(wanted if seed % 3 else found, objects).whole() == [True, True]
    assert other.all().equal(expected.all()), "decoded pages differ from the twin's"


def check_ends(device: str, small: bool) -> int:
    """Numbers at a dtype's end and groups of zeros are the twin's; NaN and infinity are told."""
    checked = 0
    for spec in ("int8", "fp8", "int4", "int4:k=token,group=7", "rotated4"):
        for element in FLOATS[: 1 if small and spec != "int4" else 3]:
            page_map = map_of("HNC", 1, 32, element)
            kv = kv_like(page_map.shape(LAYERS, 20), torch.float32, 0)
            for size in (0.0, 1.0, 0.5, 2.0**-20):
                numbers = (kv / kv.abs().amax() * size * torch.finfo(element).max).to(element)
                engine = Engine(page_map, 4, device)
                engine.typed.write(numbers.to(device), [2, 1])
                twin = PageCodec(get_serde(spec), page_map)
                want = twin.encode(engine.pages([2, 1]), 20)
                codec = codec_of(spec, Addresses(engine.typed))
                staging = Staging(codec, torch.device(device), codec.plan(20).num_bytes, depth=1)
                host = torch.zeros(staging.buffer_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
                (got,) = staging.save([[2, 1]], 20, host).encoded()
                assert got is not None
                assert all(bits(got.parts[name]).equal(bits(part)) for name, part in want.parts.items()), (spec, size)
                staging.load([want], [[2, 1]]).whole()
                assert bits(engine.typed.read([2, 1], 20).cpu()).equal(bits(twin.serde.decode(want))), (spec, size)
                checked += 1
            for odd in (float("nan"), float("inf"), -float("inf")):
                spoiled = kv.to(element)
                spoiled[1, 19, 0, 1, 31] = odd
                engine.typed.write(spoiled.to(device), [2, 1])
                assert staging.save([[2, 1]], 20, host).encoded() == [None], (spec, odd)
                checked += 1
    return checked


def check_broken(device: str, count: int) -> int:
    """Objects that are broken anywhere are refused, or change no byte outside of their tokens."""
    checked = 0
    source = torch.Generator().manual_seed(0)
    for spec in ("int8", "int4", "lossless"):
        page_map = map_of("HNC", 1, 16, torch.bfloat16, slack=64)
        engine = Engine(page_map, 20, device)
        blocks = list(range(3, 12))
        engine.typed.write(kv_like(page_map.shape(LAYERS, 133), torch.bfloat16, 3).to(device), blocks)
        codec = codec_of(spec, Addresses(engine.typed))
        staging = Staging(codec, torch.device(device), codec.plan(133).num_bytes, depth=1)
        want = PageCodec(get_serde(spec), page_map).encode(engine.pages(blocks), 133)
        free = torch.ones(LAYERS, 20, page_map.page_bytes, dtype=torch.bool)
        for at, block in enumerate(blocks):
            places = page_map.offsets[: 133 - at * BLOCK].flatten()
            free[:, block, places] = free[:, block, places + 1] = False
        before = engine.all()
        for _ in range(count):
            name = list(want.parts)[int(torch.randint(len(want.parts), (1,), generator=source))]
            part = want.parts[name].clone()
            flat = part.reshape(-1).view(torch.uint8)
            at = torch.randint(flat.numel(), (8,), generator=source)
            flat[at] = torch.randint(0, 256, (8,), dtype=torch.uint8, generator=source)
            if int(torch.randint(4, (1,), generator=source)) == 0:
                part = part.reshape(-1)[: -int(torch.randint(1, 9, (1,), generator=source))]
            held = engine.all()
            try:
                whole = staging.load([replace(want, parts={**want.parts, name: part})], [blocks]).whole()
            except FormatError:
                whole = [False]
            after = engine.all()
            assert after.equal(held) or whole[0], "a refused object was written"
            assert after[free].equal(before[free]), "a broken object wrote outside of its tokens"
            checked += 1
    return checked


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_all(device: str, small: bool) -> int:
    checked = 0
    for at, (spec, shape, element, tokens) in enumerate(cases(small)):
        try:
            check(spec, shape, element, tokens, device, at)
        except AssertionError as error:
            raise SystemExit(f"{spec}, {shape}, {element}, {tokens} tokens: {error}") from error
        checked += 1
    return checked + check_ends(device, small) + check_broken(device, 8 if small else 200)


# ---- speed


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(2):
        work()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """By the host's clock around a synchronise: streams of their own are no part of the current one's events."""
    work()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rows(repeats: int) -> Iterator[dict[str, object]]:
    from kvlab.paged.cuda import CudaTransfer

    name, heads, dim, layers = QWEN
    page_map = map_of(name, heads, dim, torch.bfloat16)
    chunk_bytes = 16 * layers * page_map.page_bytes
    most = max(MIB) * 2**20 // chunk_bytes
    engine = Engine(page_map, 16 * most, "cuda", layers)
    kv = kv_like(page_map.shape(layers, 256), torch.bfloat16, 0).cuda()
    for at in range(most):
        engine.typed.write(kv, list(range(16 * at, 16 * at + 16)))
    order = torch.randperm(16 * most, generator=torch.Generator().manual_seed(0)).tolist()
    # Chunks keep their content, blocks of a chunk lie anywhere.
    for cache in engine.caches.values():
        cache[torch.tensor(order, device="cuda")] = cache.clone()
    objects = [order[16 * at : 16 * at + 16] for at in range(most)]
    plain = CudaTransfer(engine.typed.layout, 16 * most)
    about = {
        "machine": torch.cuda.get_device_name(), "repeats": repeats,
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
    }  # fmt: skip
    started = time.monotonic()
    for spec in KINDS:
        codec = codec_of(spec, Addresses(engine.typed))
        each = codec.plan(256).num_bytes
        for mib in MIB:
            if time.monotonic() - started > BUDGET_S:
                print(f"left out for time: {spec} from {mib} MiB on", file=sys.stderr)
                break
            chosen = objects[: max(1, mib * 2**20 // chunk_bytes)]
            raw = len(chosen) * chunk_bytes
            buffer = torch.empty(len(chosen) * each, dtype=torch.uint8, device="cuda")
            flags = torch.zeros((len(chosen), 2), dtype=torch.int32, device="cuda")
            source = torch.empty(raw, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            copy_ms = milliseconds(lambda: target.copy_(source), repeats)
            encode_ms = milliseconds(lambda: codec.encode(chosen, 256, buffer, flags), repeats)
            told = flags.tolist()
            assert not any(odd for odd, _ in told), "a chunk is none of this codec's"

            def decode() -> None:
                if isinstance(codec, LosslessCodec):
                    codec.decode(buffer, chosen, 256, [escapes for _, escapes in told], flags)
                else:
                    codec.decode(buffer, chosen, 256)

            held = engine.pages(chosen[-1]) if spec == "lossless" else None
            decode_ms = milliseconds(decode, repeats)
            assert held is None or engine.pages(chosen[-1]).equal(held), "lossless pages changed"
            staging = Staging(codec, torch.device("cuda"), max(each, 16 << 20))
            group = min(staging.room(256), len(chosen))
            host = torch.empty(len(chosen) * each, dtype=torch.uint8, pin_memory=True)
            pieces = [chosen[at : at + group] for at in range(0, len(chosen), group)]
            saved: list[object] = []

            def save() -> None:
                saved[:] = [
                    staging.save(piece, 256, host[at * group * each :]) for at, piece in enumerate(pieces)
                ]  # fmt: skip

            save_s = seconds_of(save, repeats)
            parts = [one.encoded() for one in saved]  # type: ignore[attr-defined]

            def load() -> None:
                for piece, encoded in zip(pieces, parts, strict=True):
                    staging.load(encoded, piece)

            load_s = seconds_of(load, repeats)
            blocks = [block for block_ids in chosen for block in block_ids]
            slots = list(range(len(blocks)))
            plain_save = seconds_of(lambda: plain.save(blocks, slots), repeats)
            plain_load = seconds_of(lambda: plain.load(slots, blocks), repeats)
            ratio = round(raw / sum(bits_of // 8 for one in parts for bits_of in sizes(one)), 3)
            for what, ms, beside in (
                ("encode", encode_ms, copy_ms), ("decode", decode_ms, copy_ms),
                ("save", save_s * 1e3, plain_save * 1e3), ("load", load_s * 1e3, plain_load * 1e3),
            ):  # fmt: skip
                yield {
                    "what": what, "kind": spec, "raw_mib": round(raw / 2**20), "ratio": ratio, "ms": round(ms, 4),
                    "gb_s": round(raw / ms / 1e6, 1), "plain_ms": round(beside, 4),
                    "plain_gb_s": round(raw / beside / 1e6, 1), "of_plain": round(ms / beside, 3), **about,
                }  # fmt: skip


def sizes(encoded: Sequence[object]) -> Iterator[int]:
    for one in encoded:
        yield sum(one.bits().values())  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="compare bytes, time nothing")
    parser.add_argument("--small", action="store_true", help="a few cases of each, for Triton's interpreter")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=Path, help="CSV to append to")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    print(
        f"{check_all(device, args.small)} checks agree with the twins, {time.monotonic() - started:.0f} s", flush=True
    )
    if args.check_only:
        return
    if device != "cuda":
        raise SystemExit("speed needs an NVIDIA GPU")
    found = []
    for row in rows(args.repeats):
        found.append(row)
        print(
            f"{row['what']:7} {row['kind']:24} {row['raw_mib']:>4} MiB raw, ratio {row['ratio']:<6} {row['ms']:>9} ms "
            f"{row['gb_s']:>7} GB/s  plain {row['plain_gb_s']:>7}",
            flush=True,
        )
    if args.rows:
        append_rows(args.rows, found)


if __name__ == "__main__":
    main()
