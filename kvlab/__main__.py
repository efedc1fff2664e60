"""The command line: ``kvlab SUBCOMMAND ...``. Each subcommand lives in its own room and is imported on use."""

import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module

from kvlab import __version__
from kvlab.errors import KVLabError, missing_package
from kvlab.stores.url import hide_logins, shown_url

COMMANDS = {  # name -> ("module:function taking the remaining arguments", one line of help)
    "profile": ("kvlab.cli.profile:main", "make a model's tables for the cachegen serde"),
    "size": ("kvlab.cli.size:main", "how big the KV cache of a model is, and why"),
    "simulate": ("kvlab.cli.simulate:main", "what a cache would do for given traffic"),
    "bench": ("kvlab.cli.bench:main", "serving benchmarks: backends side by side, first and second run"),
    "store": ("kvlab.cli.store:main", "look into a tier: list, verify, evict, clear"),
}


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
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(args: list[str]) -> int:
    if args[:1] == ["--version"]:
        print(f"kvlab {__version__}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        print("usage: kvlab COMMAND ...\n\n" + "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()))
        return 0 if args else 2
    if args[0] not in COMMANDS:
        print(f"kvlab: unknown command {shown_url(args[0])!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[args[0]][0].partition(":")
    try:
        return int(getattr(import_module(module), function)(args[1:]))
    except (KVLabError, ModuleNotFoundError) as raised:
        error = missing_package(raised) if isinstance(raised, ModuleNotFoundError) else raised
        if not isinstance(error, KVLabError):
            raise
        print(hide_logins(f"kvlab {args[0]}: {error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
