"""``kvlab size``: the size calculator on the command line."""

import argparse
import json
from collections.abc import Sequence

from kvlab.cli.parser import OneLineParser
from kvlab.sizing.calculator import ENGINES, size_calculator
from kvlab.sizing.report import LENGTHS, as_dict, text
from kvlab.units import parse_tokens


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab size``."""
    p = OneLineParser(prog="kvlab size", description="How big the KV cache of a model is, and why.")
    p.add_argument("model", help="a name (Qwen2.5-7B), a config.json, or the folder that holds it")
    p.add_argument(
        "--tokens", action="append", metavar="N", help="length of a sequence: 4096, 32k, 1M; may be repeated"
    )
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
    size = size_calculator(
        args.model,
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
    lengths = tuple(parse_tokens(n) for n in args.tokens) if args.tokens else LENGTHS
    how = {"block_size": args.block_size, "max_num_batched_tokens": args.max_num_batched_tokens}
    if args.json:
        answers = [as_dict(size, n, **how) for n in lengths]
        print(json.dumps(answers[0] if len(answers) == 1 else answers, indent=2))
    else:
        print(text(size, lengths, **how))
    return 0
