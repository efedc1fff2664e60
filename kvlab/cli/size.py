"""``kvlab size``: the size calculator on the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvlab.cli.parser import Parser
from kvlab.cli.show import BOLD, DIM, print_json, styled, table
from kvlab.cli.tiers import stack_of
from kvlab.errors import ConfigError
from kvlab.sizing.calculator import ENGINES, size_calculator
from kvlab.sizing.catalog import catalog
from kvlab.sizing.compare import compare_sizes
from kvlab.sizing.kv_size import KVSize
from kvlab.sizing.report import LENGTHS, as_dict, text
from kvlab.units import format_bytes, parse_tokens

CONTEXT = "4096"  # tokens, unless told
COMPARED = (4096, 32768, 131072)  # tokens, unless told
EXAMPLES = (
    "kvlab size Qwen2.5-7B",
    "kvlab size Qwen2.5-7B --sessions-in 80GiB --context 32k   how many sessions fit",
    "kvlab size Qwen2.5-7B DeepSeek-V3 --tokens 32k             several models",
    "kvlab size --list qwen3                                    the models known by name",
)


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab size``."""
    p = Parser("kvlab size", "How big the KV cache of a model is, and why.", examples=EXAMPLES)
    p.add_argument("model", nargs="*", help="a name (Qwen2.5-7B), a config.json, or the folder that holds it")
    p.add_argument("--list", action="store_true", help="the models known by name; MODEL is a part of a name then")
    p.add_argument(
        "--tokens", action="append", metavar="N", help="length of a sequence: 4096, 32k, 1M; may be repeated"
    )
    p.add_argument(
        "--sessions-in",
        action="append",
        metavar="SIZE",
        help="how many sessions fit in so much memory (80GiB), in a tier (file:///kv?size=1TiB), or in each tier of a "
        "stack (with + between); may be repeated",
    )
    p.add_argument("--context", metavar="N", help=f"with --sessions-in: tokens of a session (default: {CONTEXT})")
    p.add_argument("--dtype", default="auto", help="KV dtype: auto, bf16, fp8, int4_per_token_head, q8_0, ...")
    p.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    p.add_argument("--pp", type=int, default=1, help="pipeline-parallel stages")
    p.add_argument("--engine", default="vllm", choices=ENGINES, help="whose conventions the logical bytes follow")
    p.add_argument("--state-dtype", default="auto", help="dtype of recurrent states")
    p.add_argument("--factor", type=float, default=1.0, help="stored bytes per raw byte of a serde")
    p.add_argument("--mtp", action="store_true", help="count multi-token-prediction layers")
    p.add_argument("--encoder-tokens", type=int, default=None, help="tokens that cross-attention layers hold")
    p.add_argument("--block-size", type=int, default=16, help="vLLM's block size in tokens")
    p.add_argument("--max-num-batched-tokens", type=int, default=8192, help="vLLM's tokens per step")
    p.add_argument("--hub", action="store_true", help="look an unknown name up on the Hugging Face hub")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


def main(argv: Sequence[str]) -> int:
    """Print the answer; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    if args.list:
        return _list(args)
    if not args.model:
        raise ConfigError("give a model, like kvlab size Qwen2.5-7B; kvlab size --list names those that are known")
    sizes = [
        size_calculator(
            model,
            args.dtype,
            args.tp,
            args.pp,
            engine=args.engine,
            state_dtype=args.state_dtype,
            factor=args.factor,
            mtp=args.mtp,
            encoder_tokens=args.encoder_tokens,
            hub=args.hub,
        )
        for model in args.model
    ]
    if args.sessions_in:
        return _plan(args, sizes)
    if args.context is not None:
        raise ConfigError("--context goes with --sessions-in; the length of a sequence is --tokens")
    if len(sizes) > 1:
        return _compare(args, sizes)
    (size,) = sizes
    lengths = tuple(parse_tokens(n) for n in args.tokens) if args.tokens else LENGTHS
    how = {"block_size": args.block_size, "max_num_batched_tokens": args.max_num_batched_tokens}
    if args.json:
        answers = [as_dict(size, n, **how) for n in lengths]
        print_json(answers[0] if len(answers) == 1 else answers)
        return 0
    why, _, numbers = text(size, lengths, **how).rpartition("\n\n")
    head, _, rows = numbers.partition("\n")
    print(f"{why}\n\n{styled(head, BOLD)}\n{rows}")
    return 0


def _list(args: argparse.Namespace) -> int:
    names = [name for name in catalog() if all(part.lower() in name.lower() for part in args.model)]
    if not names:
        raise ConfigError(f"no model's name holds {' and '.join(args.model)!r}; kvlab size --list names all of them")
    if args.json:
        print_json(names)
    else:
        print("\n".join(names))
    return 0


def _plan(args: argparse.Namespace, sizes: Sequence[KVSize]) -> int:
    """Sessions that fit: stored as objects in a tier, and as pages in a pool of vLLM of this size on each rank."""
    rows: list[dict[str, Any]] = []
    context = args.context or CONTEXT
    tiers = [tier for stack in args.sessions_in for tier in stack_of(stack)]
    for size in sizes:
        for tier in size.plan(tiers, tokens=context):
            row = {"model": size.name, "dtype": size.dtype, **asdict(tier)}
            if args.engine == "vllm" and tier.tier == "memory://":
                held = size.reserved(
                    context, block_size=args.block_size, max_num_batched_tokens=args.max_num_batched_tokens
                )
                row["sessions_in_vllm_pool"] = tier.size_bytes // held.bytes
            rows.append(row)
    if args.json:
        print_json(rows)
        return 0
    heads = ("model", "room", "one session", "sessions in a tier", "in vLLM's pool, per rank")
    cells = [
        (
            row["model"],
            f"{row['tier']} {format_bytes(row['size_bytes'])}",
            format_bytes(row["session_bytes"]),
            f"{row['sessions']:,}",
            f"{row['sessions_in_vllm_pool']:,}" if "sessions_in_vllm_pool" in row else "-",
        )
        for row in rows
    ]
    print(styled(f"Sessions of {parse_tokens(context):,} tokens", DIM))
    print(table([heads, *cells], left=2))
    return 0


def _compare(args: argparse.Namespace, sizes: Sequence[KVSize]) -> int:
    found = compare_sizes(sizes, args.tokens or COMPARED)
    if args.json:
        print_json(found.rows)
        return 0
    heads = ("model", "dtype", "bytes per token", *(f"{n:,} tokens" for n in found.lengths))
    cells = [
        (size.name, size.dtype, f"{size.growing_bytes:,}", *(format_bytes(size.at(n)) for n in found.lengths))
        for size in sizes
    ]
    print(table([heads, *cells], left=2))
    return 0
