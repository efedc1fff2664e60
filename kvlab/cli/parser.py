"""Argument parsers of the subcommands: one line for a wrong argument, in words of flags, and never a login."""

import argparse
import re
from pathlib import Path
from typing import NoReturn

from kvlab.errors import ConfigError
from kvlab.stores.url import hide_logins


class Parser(argparse.ArgumentParser):
    """Raises ConfigError, which the dispatcher turns into one line; its help ends with examples."""

    def __init__(self, prog: str, description: str, *, examples: tuple[str, ...] = (), more: str = "") -> None:
        shown = "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else ""
        super().__init__(
            prog=prog,
            description=description,
            epilog="\n\n".join(filter(None, [more, shown])),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(hide_logins(f"{message}; see {self.prog} --help"))


def in_flags(message: str, parser: argparse.ArgumentParser) -> str:
    """`message` of a Python function in the words of the command line: ``hub=True`` is ``--hub``, ``request_rate`` is
    ``--request-rate``, and what has no flag is left out.

    >>> parser = Parser("kvlab size", "")
    >>> _ = parser.add_argument("--hub"), parser.add_argument("--request-rate")
    >>> in_flags("give hub=True, or request_rate=... (or other=...)", parser)
    'give --hub, or --request-rate'
    """
    flags = {action.dest: action.option_strings[-1] for action in _actions(parser) if action.option_strings}
    for name, flag in flags.items():
        message = re.sub(rf"\b{name}=(True\b|\.\.\.)", flag, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w/.?&-]){name}\b(?!=)", flag, message)
    return re.sub(r" \(or \w+=\.\.\.\)", "", message)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the words that may stand first, by word."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [*parser._actions, *(action for one in subcommands(parser).values() for action in one._actions)]


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that send prompts in files to a running server."""
    parser.add_argument(
        "file", nargs="+", type=Path, help="a prompt, or .jsonl: one a line, as text, token ids or chat messages"
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="of vLLM's API server, or its /v1 (default: %(default)s)",
    )
    parser.add_argument("--model", help="as the server names it; default its first")
