"""``kvlab watch``: what a running vLLM says of its KV blocks, in lines, and as a trace."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kvlab.cli.parser import Parser
from kvlab.cli.show import print_json
from kvlab.errors import ConfigError
from kvlab.serving.events import MOST_HELD, KVEvents, watch
from kvlab.simulation.trace_files import save_traffic

LOOK_S = 0.5  # so that `--for-s` ends in time


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab watch``."""
    examples = ("kvlab watch", "kvlab watch tcp://gpu-1:5557 --for-s 600 --trace seen.jsonl")
    about = "Follow the KV events of a running vLLM: blocks held, stored and removed, by medium."
    more = "vLLM publishes them with --kv-events-config '{\"enable_kv_cache_events\": true}'. Ctrl-C ends it."
    p = Parser("kvlab watch", about, examples=examples, more=more)
    p.add_argument("endpoint", nargs="?", default="tcp://127.0.0.1:5557", help="default: %(default)s")
    p.add_argument("--topic", default="", help="vLLM's, where it has one")
    p.add_argument("--every-s", type=float, default=5.0, metavar="SECONDS", help="a line (default: %(default)s)")
    p.add_argument("--for-s", type=float, metavar="SECONDS", help="end after so long")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write the computed prompts as a trace, without tokens")
    p.add_argument("--json", action="store_true", help="print the last state as rows")
    return p


def main(argv: Sequence[str]) -> int:
    """Follow them; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    if not args.every_s > 0 or (args.for_s is not None and not args.for_s > 0):
        raise ConfigError("--every-s and --for-s must be seconds above 0")
    state, started, told, has_forgotten = KVEvents(), time.monotonic(), 0.0, False
    try:
        for state in watch(args.endpoint, topic=args.topic, wait_s=min(args.every_s, LOOK_S)):
            now = time.monotonic() - started
            if now - told >= args.every_s and not args.json:
                told = now
                print(state, flush=True)
            if state.forgotten and not has_forgotten:
                has_forgotten = True
                print(f"more than {MOST_HELD:,} blocks are held: from now on the oldest are forgotten", file=sys.stderr)
            if args.for_s is not None and now >= args.for_s:
                break
    except KeyboardInterrupt:
        pass
    if not (state.taken or state.broken or args.json):
        print(f"no events came from {args.endpoint}")
    if args.trace is not None:
        save_traffic(state.traffic(), args.trace)
        left_out = f"; {state.left_out:,} stored sequences are not in it, see the guide" if state.left_out else ""
        print(f"{args.trace}: blocks of {state.block_tokens} tokens{left_out}")
    if args.json:
        print_json(state.rows())
    return 0
