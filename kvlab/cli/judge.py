"""``kvlab judge``: put any KV connector of vLLM through traps."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvlab.cli.parser import Parser
from kvlab.cli.show import GREEN, RED, print_json, styled, table
from kvlab.errors import ConfigError
from kvlab.judge.report import BAD, HELD, Report, Verdict
from kvlab.judge.subject import Subject

WIDEST = 100  # characters of a reason in the table; JSON and HTML have all of it


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab judge``."""
    examples = (
        'kvlab judge kvlab.connectors.vllm:KVLabConnector --extra \'{"tiers": ["memory://"]}\'',
        'kvlab judge ExampleConnector --extra \'{"shared_storage_path": "{storage}"}\' --html judged.html',
        "kvlab judge my_package.connector:MyConnector --traps edges,forks,aborts",
    )
    about = "Put a KV connector of vLLM through traps: does a hit answer as a recompute does?"
    more = "Exit status: 1 where a trap failed, crashed or hung, or no engine started with it. The traps: --list."
    p = Parser("kvlab judge", about, examples=examples, more=more)
    p.add_argument("connector", nargs="?", metavar="MODULE:CLASS", help="or a name that vLLM knows")
    p.add_argument("--extra", default="", metavar="JSON", help='kv_connector_extra_config; "{storage}" is a folder')
    p.add_argument("--engine", default="", metavar="JSON", help="further arguments of vLLM's LLM")
    p.add_argument("--traps", default="", metavar="NAMES", help="some of them, with commas; default all")
    p.add_argument("--list", action="store_true", help="print the traps and what they are")
    p.add_argument("--model", default="", metavar="FOLDER", help="a checkpoint; default a small random Llama")
    p.add_argument("--seed", type=int, default=0, help="of prompts and random traffic (default: %(default)s)")
    p.add_argument("--deadline-s", type=float, default=300.0, help="for a start or a trap (default: %(default)s)")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the report as JSON; default to stdout")
    p.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page")
    return p


def main(argv: Sequence[str]) -> int:
    """Judge it; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    from kvlab.judge.run import judge  # which needs PyTorch; help and completion do not
    from kvlab.judge.traps import TRAPS

    if args.list:
        print(table([["trap", "what happens"], *([one.name, one.about] for one in TRAPS.values())], left=2))
        return 0
    if not args.connector:
        raise ConfigError("give a connector, like kvlab judge my_package.connector:MyConnector; or --list")
    if not 0 < args.deadline_s < float("inf"):
        raise ConfigError(f"deadline_s must be above 0, got {args.deadline_s}")
    report = judge(
        Subject.parse(args.connector, args.extra, args.engine),
        traps=[name for name in args.traps.split(",") if name] or None,
        model=args.model,
        seed=args.seed,
        deadline_s=args.deadline_s,
        told=_tell,
    )
    if args.json != "-":
        rows = [[*row[:-1], row[-1][:WIDEST]] for row in report.rows()]
        print(table(rows, left=2) + "\n" + ", ".join(f"{count} {kind}" for kind, count in report.counts.items()))
    _write(report, args.json, args.html)
    return int(report.has_failed)


def _write(report: Report, to_json: str | None, to_html: Path | None) -> None:
    if to_json == "-":
        print_json(report.to_dict())
    try:
        if to_json and to_json != "-":
            Path(to_json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        if to_html:
            to_html.write_text(report.to_html(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report: {error.filename}: {error.strerror}") from error


def _tell(one: Verdict) -> None:
    colour = GREEN if one.verdict == HELD else RED if one.verdict in BAD else ""
    shown = styled(one.verdict, colour) if colour else one.verdict
    print(f"{one.trap}: {shown}", file=sys.stderr, flush=True)
