"""The command line: ``kvlab SUBCOMMAND ...``. Each subcommand lives in its own room and is imported on use."""

import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from kvlab import __version__
from kvlab.cli.commands import COMMANDS
from kvlab.cli.parser import in_flags
from kvlab.cli.show import BOLD, DIM, styled
from kvlab.errors import KVLabError, missing_package
from kvlab.stores.url import hide_logins, shown_url

INTERRUPTED = 130  # what a shell shows for a command that ctrl-C ended
OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of a write to a file that print has no name of
BROKEN_PIPE = 141  # what a shell shows for a command that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit status 2 and one line on stderr for anything the user can mend."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a key may hold what the terminal cannot show
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            _flush()
    except KeyboardInterrupt:  # before or after the command itself
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS or error.filename is not None:
            raise
        print(f"kvlab: cannot write the output: {error.strerror}", file=sys.stderr)
        _drop_output()
        return 2


def _flush() -> None:
    if sys.stdout is not None:  # as it is where it was closed before the start
        sys.stdout.flush()


def _drop_output() -> None:
    """The interpreter flushes once more at exit; what is left in the buffer has no reader."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_has_left() -> bool:
    """Whether stdout is the pipe that broke, as it is behind `| head -1`."""
    if not hasattr(select, "poll"):  # as on Windows, where a pipe is told of no otherwise
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        print(f"kvlab {__version__}")
        return 0
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if args else 2
    if args[0] not in COMMANDS:
        near = get_close_matches(args[0], COMMANDS, n=1)
        hint = f"do you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"kvlab: unknown command {shown_url(args[0])!r}; {hint}", file=sys.stderr)
        return 2
    name = args[0]
    module: Any = None
    try:
        module = import_module(COMMANDS[name].module)
        return int(module.main(args[1:]))
    except KeyboardInterrupt:
        return _failed(name, "interrupted", INTERRUPTED)
    except KVLabError as error:
        return _failed(name, in_flags(str(error), module.parser()) if module else str(error))
    except ModuleNotFoundError as error:
        known = missing_package(error)
        if known is error:
            raise
        return _failed(name, str(known))
    except OSError as error:  # a file that is not there, is a folder, or may not be read
        if error.filename is None or isinstance(error, BrokenPipeError):
            raise
        return _failed(name, f"cannot use {str(error.filename)!r}: {error.strerror}")


def _failed(name: str, why: str, status: int = 2) -> int:
    print(hide_logins(f"kvlab {name}: {' '.join(why.split())}"), file=sys.stderr)
    return status


def _help() -> str:
    lines = ["usage: kvlab COMMAND ...   kvlab COMMAND --help says more   kvlab --version", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {styled(name.ljust(10), BOLD)} {command.about}", f"  {'':10} {styled(command.example, DIM)}"]
    lines += ["", "exit status: 0 fine, 1 something in a store is broken, 2 wrong use or no access, 130 interrupted"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
