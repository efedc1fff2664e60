"""``kvlab config``: the JSON of vLLM's ``--kv-transfer-config``, checked before an engine starts."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlab.cli.lmcache import CONFIG_FILE, from_environment, from_yaml, translate
from kvlab.cli.parser import Parser
from kvlab.cli.tiers import as_urls
from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError

EXAMPLES = (
    "kvlab config 'memory://?size=8GiB' 'file:///data/kv?size=1TiB' chunk_tokens=512",
    "kvlab config '8GiB+file:///data/kv?size=1TiB' --shell        a whole flag, quoted for a shell",
    'vllm serve MODEL --kv-transfer-config "$(kvlab config 8GiB)"',
    "kvlab config from-lmcache lmcache.yaml                       LMCache's YAML file",
    "kvlab config from-lmcache --env                              its LMCACHE_ variables",
)
FROM_LMCACHE = "from-lmcache"
BLOCK = 16  # tokens; vLLM's on most GPUs, others are multiples of it


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab config``."""
    p = Parser(
        "kvlab config", "The JSON of vLLM's --kv-transfer-config, checked as vllm_config does.", examples=EXAMPLES
    )
    p.add_argument(
        "given",
        nargs="+",
        metavar="URL|SETTING=VALUE",
        help="tiers, fastest first: URLs, sizes of host memory, or both joined by +; and settings of the connector. "
        f"Or {FROM_LMCACHE} and a YAML file",
    )
    p.add_argument(
        "--env",
        action="store_true",
        help=f"with {FROM_LMCACHE}: the environment's LMCACHE_ variables, over LMCACHE_CONFIG_FILE",
    )
    p.add_argument("--shell", action="store_true", help="print the whole flag, quoted for a shell")
    p.add_argument("--json", action="store_true", help="indented JSON; without it one line")
    return p


def main(argv: Sequence[str]) -> int:
    """Print the JSON; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    if args.given[0] == FROM_LMCACHE:
        tiers, settings = _from_lmcache(args)
    elif args.env:
        raise ConfigError(f"--env goes with {FROM_LMCACHE}")
    else:
        tiers, settings = _given(args.given)
    made = vllm_config(tiers, **settings)
    chunk = settings.get("chunk_tokens", BLOCK)
    if chunk % BLOCK:
        print(
            f"chunk_tokens={chunk} is no multiple of {BLOCK}, vLLM's usual block size: the engine refuses it unless it "
            "runs with a --block-size that divides it",
            file=sys.stderr,
        )
    if args.shell:
        print(f"--kv-transfer-config {shlex.quote(json.dumps(made))}")
    else:
        print(json.dumps(made, indent=2 if args.json else None))
    return 0


def _given(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    tiers: list[str] = []
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier():
            if name == "tiers":
                raise ConfigError("tiers stand by themselves: 'memory://?size=8GiB' 'file:///data/kv?size=1TiB'")
            if name in settings:
                raise ConfigError(f"{name} is given twice")
            settings[name] = setting(value)
        else:
            tiers += as_urls(word)
    if not tiers:
        raise ConfigError("give a tier, like 'memory://?size=8GiB'")
    return tiers, settings


def setting(text: str) -> Any:
    """A value of the command line: true, false, a number, else text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _from_lmcache(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    files = args.given[1:]
    if bool(files) == args.env or len(files) > 1:
        raise ConfigError(f"{FROM_LMCACHE} takes a YAML file, or --env for the environment's variables")
    if args.env:
        path = os.environ.get(CONFIG_FILE)
        found = (from_yaml(_read(path), path) if path else {}) | from_environment(os.environ)
        if not found:
            raise ConfigError("the environment has no variable that begins with LMCACHE_")
    else:
        found = from_yaml(_read(files[0]), files[0])
    done = translate(found)
    for line in done.left_out:
        print(line, file=sys.stderr)
    return done.tiers, done.settings


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path!r} is not UTF-8 text") from error
