"""``kvlab bench``: serving benchmarks of backends side by side, and the tables of rows measured before."""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from kvlab.cli.config import setting
from kvlab.cli.parser import Parser
from kvlab.cli.show import print_json
from kvlab.cli.tiers import as_urls
from kvlab.errors import ConfigError
from kvlab.serving.backends import NAMES
from kvlab.serving.runs import run
from kvlab.serving.tables import read_rows, report, serving_block
from kvlab.serving.workloads import KINDS

EXAMPLES = (
    "kvlab bench                                           no cache, then host memory, on the demo model",
    "kvlab bench --backends none,kvlab-disk --model MODEL --out rows.jsonl",
    "kvlab bench --backends '1GiB+file:///kv?size=8GiB' --num-prompts 64 --request-rate 2",
    "kvlab bench --restart --backends none,kvlab-memory,kvlab-disk,kvlab-redis,kvlab-serve",
    "kvlab bench --report rows.jsonl",
)

TOLD = "(default: %(default)s)"


def main(argv: Sequence[str]) -> int:
    """Run it; rows go to --out as they come, tables to stdout."""
    made = parser()
    options, rest = made.parse_known_args([*argv])
    if rest and rest[0] != "--":
        made.error(f"unknown argument {rest[0]!r}; flags for the server go after --")
    if options.report:
        rows = [row for path in options.report for row in read_rows(path)]
        if options.json:
            print_json(rows)
        else:
            print(report(rows))
        return 0
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a polite kill or a closed terminal stops the servers as ctrl-C does
        signal.signal(number, _interrupt)
    names: list[Any] = [_backend(name) for name in options.backends.split(",") if name]
    try:
        rows = run(
            names,
            model=options.model,
            dataset=options.dataset.split(","),
            dataset_path=options.dataset_path,
            num_prompts=options.num_prompts and _numbers(options.num_prompts, int, "--num-prompts"),
            request_rate=options.request_rate and _numbers(options.request_rate, float, "--request-rate"),
            runs=options.runs,
            together=options.together,
            restart=options.restart,
            seed=_numbers(options.seed, int, "--seed"),
            output_len=options.output_len,
            max_prompt_tokens=options.max_prompt_tokens,
            cache_size=options.cache_size,
            redis_url=options.redis_url,
            settings=dict(_setting(text) for text in options.set),
            server_flags=[*_server_flags(options), *rest[1:]],
            backend_flags={
                name: shlex.split(text) for name, text in (_pair(t, "--flags-of") for t in options.flags_of)
            },
            env=dict(_pair(text, "--env") for text in options.env),
            port=options.port,
            ignore_eos=options.ignore_eos,
            warmups=options.warmups,
            start_timeout_s=options.start_timeout,
            folder=options.folder,
            out=options.out,
            tell=lambda line: print(f"kvlab bench: {line}", file=sys.stderr),
        )
    except KeyboardInterrupt:
        print("kvlab bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        print(serving_block(row))
    print("\n" + report(rows))
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab bench``."""
    about = "Serving benchmarks of backends side by side, and the tables of rows measured before."
    made = Parser("kvlab bench", about, examples=EXAMPLES, more="Flags after -- go to every server.")
    add = made.add_argument
    named = ", ".join(NAMES)
    add(
        "--backends",
        default="none,kvlab-memory",
        help=f"names, URLs, or stacks of them with +, with commas: {named} {TOLD}",
    )
    add("--model", help="folder or hub id; default the small demo model")
    add(
        "--dataset",
        default="sharegpt",
        help=f"{', '.join(KINDS)}; several, with commas, are sent one after the other {TOLD}",
    )
    add("--dataset-path", help="a ShareGPT JSON file, or a trace in Mooncake's format")
    add("--num-prompts", help="one number, or one for each dataset with commas (default: 1024; without a GPU 16)")
    add(
        "--request-rate",
        help="requests per second; one number, or one for each dataset with commas (default: 16; without a GPU 1)",
    )
    add("--runs", type=int, default=2, help=f"how often the same prompts are sent {TOLD}")
    add("--together", action="store_true", help="start all servers first and let their runs take turns")
    add("--restart", action="store_true", help="start the server again between its runs: what is found after a restart")
    add("--seed", default="0", help=f"one number, or one for each dataset with commas {TOLD}")
    add("--output-len", type=int, help="tokens to generate for each prompt (default: the dataset's; without a GPU 32)")
    add("--ignore-eos", action="store_true", help="generate to the full length")
    add(
        "--max-prompt-tokens",
        type=int,
        default=8192,
        help=f"longest prompt of rounds, documents and trace {TOLD}",
    )
    add("--cache-size", help="of each backend's tier (default: 20GiB; without a GPU 2GiB)")
    add("--redis-url", help="a server that runs; default one of our own for each backend that needs it")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of kvlab's connector; may be repeated",
    )
    add("--env", action="append", default=[], metavar="KEY=VALUE", help="a variable of every server; may be repeated")
    add(
        "--flags-of",
        action="append",
        default=[],
        metavar="BACKEND=FLAGS",
        help="flags for one backend's server, in quotes; may be repeated",
    )
    add("--load-format", help="dummy: random weights of the model's shape")
    add("--max-model-len", type=int)
    add("--gpu-memory-utilization", type=float)
    add("--kv-cache-memory-bytes", help="of each server's own pool; on a CPU a quarter of what is free, at most 4 GiB")
    add("--enforce-eager", action="store_true", help="no compilation, no CUDA graphs")
    add("--port", type=int, help="default a free one")
    add("--warmups", type=int, default=2, help=f"random prompts before the first run {TOLD}")
    add(
        "--start-timeout",
        type=float,
        default=600.0,
        help=f"seconds a server may take to become healthy {TOLD}",
    )
    add("--folder", help="where disk tiers, logs and detailed results go and stay; default a temporary one")
    add("--out", help="append rows to this file as JSON lines")
    add("--report", nargs="+", metavar="ROWS", help="no run: print the tables of these files")
    add("--json", action="store_true", help="print the rows as JSON instead of tables")
    return made


def _backend(text: str) -> str | list[str]:
    """A name, or the tiers of a stack."""
    return as_urls(text) if "://" in text else text


def _server_flags(options: argparse.Namespace) -> list[str]:
    flags: list[str] = []
    for name in ("load_format", "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes"):
        value = getattr(options, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return [*flags, "--enforce-eager"] if options.enforce_eager else flags


def _setting(text: str) -> tuple[str, Any]:
    name, value = _pair(text, "--set")
    return name, setting(value)


def _numbers(text: str, kind: type, flag: str) -> Any:
    """One number, or several with commas between."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} takes a number, or one for each dataset with commas; got {text!r}") from None
    return found[0] if len(found) == 1 else found


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{flag} takes KEY=VALUE, got {text!r}")
    return name, value


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
