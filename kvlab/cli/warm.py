"""``kvlab warm``: send prompts to a running server before traffic comes, so that its cache holds their KV."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict

from kvlab.cli.parser import Parser, add_prompts
from kvlab.cli.show import print_json
from kvlab.serving.warm import read_prompts, warm

KEY = "VLLM_API_KEY"  # vLLM's own variable


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab warm``."""
    examples = ("kvlab warm system-prompt.txt --pin", "kvlab warm prompts.jsonl --url http://host:8000 --json")
    about = "Have a running vLLM server compute prompts and keep their KV."
    p = Parser("kvlab warm", about, examples=examples, more=f"The server's API key is read from {KEY}.")
    add_prompts(p)
    p.add_argument("--pin", action="store_true", help="keep them in the memory tier")
    p.add_argument("--ttl-s", type=float, metavar="SECONDS", help="how long a pin lasts; needs --pin")
    p.add_argument("--cache-salt", help="the salt of the requests that are to find them")
    p.add_argument("--concurrency", type=int, default=4, help="prompts on their way at a time (default: %(default)s)")
    p.add_argument("--timeout-s", type=float, default=600.0, help="that the server may take (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print one object for each prompt")
    return p


def main(argv: Sequence[str]) -> int:
    """Send them; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    prompts = [(path, prompt) for path in args.file for prompt in read_prompts(path)]
    done = warm(
        [prompt for _, prompt in prompts],
        url=args.url,
        model=args.model,
        pin=args.pin,
        ttl_s=args.ttl_s,
        cache_salt=args.cache_salt,
        api_key=os.environ.get(KEY) or None,
        concurrency=args.concurrency,
        timeout_s=args.timeout_s,
    )
    if args.json:
        print_json([{"file": str(path), **asdict(one)} for (path, _), one in zip(prompts, done, strict=True)])
        return 0
    hits = [one.hit_tokens for one in done if one.hit_tokens is not None]
    pinned = [one.pinned_objects for one in done if one.pinned_objects is not None]
    said = [f"{len(done)} prompts, {sum(one.prompt_tokens for one in done):,} tokens"]
    said += [f"{sum(hits):,} of them loaded by kvlab"] if hits else []
    said += [f"{sum(pinned):,} objects pinned"] if pinned else []
    print(", ".join(said))
    return 0
