"""``kvlab serve``: one process whose tiers the engines of this host share."""

import argparse
import contextlib
import logging
import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from kvlab.cli.parser import Parser
from kvlab.errors import ConfigError
from kvlab.hostmemory import PAGE
from kvlab.stores import check_url, open_stores
from kvlab.stores.memory import MemoryStore
from kvlab.stores.url import StoreURL, shown_url
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.metrics import MetricsServer
from kvlab.tierworker.resp import RespServer
from kvlab.units import parse_bytes

MOST_PASSWORD_BYTES = 4096
OPEN_TO_ALL = "kvlab serve: all users of this host can read and change the KV at --tcp %s: it has no --password-file"
logger = logging.getLogger("kvlab.serve")


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab serve``."""
    examples = (
        "kvlab serve --memory 64GiB --listen /run/kvlab.sock",
        "kvlab serve --memory 64GiB --tier 'file:///kv?size=1TiB' --listen /run/kvlab.sock --metrics 127.0.0.1:9400",
    )
    about = "Hold a memory tier, and tiers below it, for all engines of this host."
    more = "Engines attach with the tier kvlab:///run/kvlab.sock. SIGTERM writes what is queued, for 20 s at most."
    p = Parser("kvlab serve", about, examples=examples, more=more)
    p.add_argument("--memory", default="1GiB", metavar="SIZE", help="of the memory tier (default: %(default)s)")
    p.add_argument("--policy", default="lru", help="of the memory tier's evictions (default: %(default)s)")
    p.add_argument(
        "--copy",
        action="store_true",
        help="copy objects to each engine's memory; by default engines map the memory tier, to read, and copy from it",
    )
    p.add_argument("--tier", action="append", default=[], metavar="URL", help="below memory, fastest first; may repeat")
    p.add_argument("--listen", type=Path, required=True, metavar="PATH", help="socket for engines; this user's alone")
    p.add_argument("--tcp", metavar="HOST:PORT", help="answer other hosts in Redis' protocol (redis://HOST:PORT)")
    p.add_argument("--password-file", type=Path, metavar="FILE", help="of --tcp; needed where HOST is no loopback")
    p.add_argument("--metrics", metavar="HOST:PORT", help="serve Prometheus metrics at /metrics")
    return p


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    if parse_bytes(args.memory) < PAGE:
        raise ConfigError(f"--memory must be at least {PAGE} bytes, got {args.memory!r}")
    for url in args.tier:
        if StoreURL.parse(url).scheme in ("memory", "kvlab"):
            raise ConfigError(
                f"--tier must lie below memory, got {shown_url(url)!r}; --memory gives the memory tier its size"
            )
        if StoreURL.parse(url).holds_secret:  # every user of the machine sees a command line
            raise ConfigError(f"--tier must hold no password, {shown_url(url)!r} does; give it by ?password_file=/path")
        check_url(url)
    password = _password(args.password_file) if args.password_file else ""
    form = "%(levelname)s %(asctime)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%m-%d %H:%M:%S")
    lending = not args.copy and sys.platform == "linux"
    memory = MemoryStore(parse_bytes(args.memory), policy=args.policy, pinned=False, lending=lending)
    store = open_stores([memory, *args.tier])
    _raise_file_limit()
    server = CacheServer(store, args.listen)
    with contextlib.ExitStack() as beside:
        beside.callback(server.leave_place)  # also where what is beside it cannot listen
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: server.stop())
        if args.metrics:
            beside.enter_context(MetricsServer(server, args.metrics))
        if args.tcp:
            resp = RespServer(store, args.tcp, password=password, budget=server.limits.on_the_way)
            beside.enter_context(resp)
            if not password:
                logger.warning(OPEN_TO_ALL, args.tcp)
        places = [str(args.listen), *filter(None, (args.tcp, args.metrics))]
        logger.info("kvlab serve: listens at %s", ", ".join(places))
        server.run()
    logger.info("kvlab serve: ended")
    logging.shutdown()
    os._exit(0)  # a thread may be stuck in a store


def _password(file: Path) -> str:
    """The one line of `file`, which no other user may read."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_PASSWORD_BYTES:
        raise ConfigError(f"--password-file {str(file)!r} must be a plain file of one line")
    if about.st_mode & 0o077:
        raise ConfigError(f"--password-file {str(file)!r} can be read or written by others; chmod 600 it")
    text = file.read_bytes().decode(errors="replace").rstrip("\r\n")
    if not text or "\n" in text or "\ufffd" in text:
        raise ConfigError(f"--password-file {str(file)!r} must hold one password in one line, in UTF-8")
    return text


def _raise_file_limit() -> None:
    """As many open files as the system allows: each engine and each client takes some."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
