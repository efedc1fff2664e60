"""``kvlab simulate``: what a cache would do, on the command line."""

import argparse
import csv
import sys
from collections.abc import Sequence
from typing import Any

from kvlab.cli.parser import Parser
from kvlab.cli.show import print_json, table
from kvlab.cli.tiers import stack_of
from kvlab.simulation.cost import CostModel, Prefill
from kvlab.simulation.generate import KINDS, generate_traffic
from kvlab.simulation.replay_tiers import Admission
from kvlab.simulation.simulate import BOUND, as_traffic
from kvlab.simulation.sweep import sweep
from kvlab.simulation.trace_files import FORMATS, load_traffic

COLUMNS = ("policy", "tiers", "block_hit_rate", "token_hit_rate", "request_hit_rate", "evictions")
EXAMPLES = (
    'kvlab simulate chat --tiers "1000 blocks" --policy lru,s3fifo,belady',
    "kvlab simulate trace.jsonl --model Qwen2.5-7B --tiers '10GiB,100GiB,10GiB+file:///kv?size=1TiB'",
    "kvlab simulate chat --model Qwen2.5-7B --tiers 10GiB --prefill-rate 12000 --per-gpu-hour 3",
)
COST_COLUMNS = ("ttft_ms", "ttft_without_ms", "gpu_s_saved", "saved_cost")


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab simulate``."""
    p = Parser("kvlab simulate", "Hit rates of a cache for given traffic.", examples=EXAMPLES)
    p.add_argument("trace", help=f"a trace ({', '.join(FORMATS)}: JSON lines), or made-up traffic: {', '.join(KINDS)}")
    p.add_argument(
        "--policy",
        action="append",
        help="eviction policies, with commas, where a URL names none; may repeat; belady is the bound (default: lru)",
    )
    p.add_argument(
        "--tiers",
        default="unbounded",
        help="URLs as stores take them, or sizes of host memory ('10GiB', '10000 blocks', unbounded), with commas; "
        "+ stacks tiers: memory://?size=10GiB+file://?size=1TiB",
    )
    p.add_argument("--model", help="whose KV it is: a name or a config.json; needed where capacities are bytes")
    p.add_argument("--serde", default=None, help="ratios or serdes of a fixed ratio, with commas: 1.45,int4")
    p.add_argument("--chunk-tokens", type=int, default=None, help="tokens of a stored object")
    p.add_argument("--store-threshold", type=int, default=1, help="store an object from its n-th use on")
    p.add_argument("--min-tokens", type=int, default=0, help="store prompts of so many tokens or more only")
    p.add_argument("--format", default="auto", choices=("auto", *FORMATS))
    p.add_argument("--block-tokens", type=int, default=None, help="tokens per block, where not the format's own")
    p.add_argument("--limit", type=int, default=None, help="only so many requests")
    p.add_argument("--reuse", type=float, default=0.5, help="of made-up traffic")
    p.add_argument("--seed", type=int, default=0, help="of made-up traffic")
    p.add_argument("--prefill-rate", type=float, default=None, metavar="TOKENS_PER_S", help="measured: adds seconds")
    p.add_argument("--per-gpu-hour", type=float, default=0.0, help="price, for saved_cost")
    p.add_argument("--workers", type=int, default=None, help="processes; all cores unless told")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    p.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    return p


def main(argv: Sequence[str]) -> int:
    """Print one row per policy, tiers and serde; raises KVLabError, which the dispatcher turns into one line."""
    args = parser().parse_args(list(argv))
    if args.trace in KINDS:
        traffic = generate_traffic(args.trace, args.limit or 2000, reuse=args.reuse, seed=args.seed)
    elif (args.format, args.block_tokens, args.limit) == ("auto", None, None):
        traffic = as_traffic(args.trace)
    else:
        traffic = load_traffic(args.trace, args.format, block_tokens=args.block_tokens, limit=args.limit)
    gate = args.store_threshold != 1 or args.min_tokens
    rate = args.prefill_rate
    cost = None if rate is None else CostModel(Prefill.at_rate(rate), per_gpu_hour=args.per_gpu_hour)
    rows = sweep(
        traffic,
        [stack_of(one) for one in args.tiers.split(",")],
        ",".join(args.policy or ["lru"]).split(","),
        serdes=[_serde(one) for one in args.serde.split(",")] if args.serde else [None],
        model=args.model,
        chunk_tokens=args.chunk_tokens,
        admission=Admission(args.store_threshold, args.min_tokens) if gate else None,
        cost=cost,
        workers=args.workers,
        progress=sys.stderr.isatty(),
    )
    if args.json:
        print_json({"traffic": traffic.summary(), "rows": rows})
    elif args.csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(_table(traffic.summary(), rows))
    return 0


def _serde(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _table(summary: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    columns = [*COLUMNS[:2], *(["serde_ratio"] if any(row["serde_ratio"] != 1 for row in rows) else []), *COLUMNS[2:]]
    columns += [name for name in COST_COLUMNS if name in rows[0]]
    lines = [columns, *([_cell(name, row[name]) for name in columns] for row in rows)]
    rates = [row["block_hit_rate"] for row in rows if row["policy"] != BOUND]
    best = {
        (number, columns.index("block_hit_rate"))
        for number, row in enumerate(rows, 1)
        if len(rates) > 1 and row["policy"] != BOUND and row["block_hit_rate"] == max(rates)
    }
    head = (
        f"{summary['traffic']}: {summary['requests']:,} requests, {summary['accesses']:,} blocks of "
        f"{summary['block_tokens']} tokens, {summary['unique_blocks']:,} different ones"
    )
    return f"{head}\n{table(lines, best=best)}"


def _cell(name: str, value: Any) -> str:
    if name.endswith("_rate"):
        return f"{100 * value:.2f}%"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
