"""``kvlab quality``: what a tier's codec costs in words, on prompts of one's own, through a running server."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict

from kvlab.cli.parser import Parser, add_prompts
from kvlab.cli.show import print_json
from kvlab.cli.warm import KEY
from kvlab.serving.quality import quality, summary
from kvlab.serving.warm import read_prompts


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab quality``."""
    examples = ("kvlab quality prompts.jsonl", "kvlab quality prompts.jsonl --url http://host:8000 --reset --json")
    about = "Have a running vLLM server answer prompts twice, computed and from decoded KV, and compare."
    p = Parser("kvlab quality", about, examples=examples, more=f"The server's API key is read from {KEY}.")
    add_prompts(p)
    p.add_argument("--greedy", type=int, default=16, help="tokens to generate (default: %(default)s)")
    p.add_argument(
        "--reset",
        action="store_true",
        help="have vLLM forget its own prefix cache in between, which would serve them by itself "
        "(needs VLLM_SERVER_DEV_MODE=1)",
    )
    p.add_argument("--timeout-s", type=float, default=600.0, help="that the server may take (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print one object for each prompt, and their means")
    return p


def main(argv: Sequence[str]) -> int:
    """Compare; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    prompts = [(path, prompt) for path in args.file for prompt in read_prompts(path)]
    found = quality(
        [prompt for _, prompt in prompts],
        url=args.url,
        model=args.model,
        greedy=args.greedy,
        reset=args.reset,
        api_key=os.environ.get(KEY) or None,
        timeout_s=args.timeout_s,
    )
    means = summary(found)
    if args.json:
        rows = [{"file": str(path), **asdict(one)} for (path, _), one in zip(prompts, found, strict=True)]
        print_json({"summary": means, "prompts": rows})
        return 0
    print(f"{means['hits']} of {means['prompts']} prompts decoded, {means['hit_tokens']:,} tokens")
    print(f"first token: the same in {means['same_first']:.1%}, KL {means['kl_mean']:.5f} nats on average and "
          f"{means['kl_worst']:.5f} at worst, its logprob moved by {means['logprob_moved']:.4f}")  # fmt: skip
    print(f"greedy tokens: {means['agreement']:.1%} up to the first that differs, of {args.greedy}")
    return 0
