"""``kvlab chaos``: faults in what a cache stores, from a proxy before a Redis or an agent on a folder."""

import argparse
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvlab.chaos.faults import KINDS, Faults
from kvlab.chaos.folder import FolderAgent
from kvlab.chaos.redis import RedisProxy
from kvlab.cli.parser import Parser
from kvlab.cli.show import print_json
from kvlab.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab chaos``."""
    examples = (
        "kvlab chaos redis --listen 127.0.0.1:6380 --to 127.0.0.1:6379 --rate 0.05",
        "kvlab chaos folder /data/kv-to-break --kinds flip,swap --every-ms 200 --limit 1000",
    )
    about = "Break what a cache stores, with a seed, until ctrl-C; then say how often."
    more = f"Kinds: {', '.join(KINDS)}. It damages what it is given: give it a copy."
    p = Parser("kvlab chaos", about, examples=examples, more=more)
    p.add_argument("what", choices=("redis", "folder"), help="a proxy before a Redis, or an agent on a folder")
    p.add_argument("path", nargs="?", type=Path, help="of the folder")
    p.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="of the proxy (default: %(default)s)")
    p.add_argument("--to", metavar="HOST:PORT", help="the Redis behind the proxy")
    p.add_argument("--kinds", default=",".join(KINDS), help="of faults (default: all)")
    p.add_argument("--rate", type=float, default=0.1, help="share of values that get one (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the faults (default: %(default)s)")
    p.add_argument("--delay-ms", type=float, default=50.0, help="how long a delay is (default: %(default)s)")
    p.add_argument("--every-ms", type=float, default=100.0, help="between files that are drawn (default: %(default)s)")
    p.add_argument("--limit", type=int, default=0, help="faults until a folder is left alone; 0 is for ever")
    p.add_argument("--json", action="store_true", help="print the counts as one object")
    return p


def main(argv: Sequence[str]) -> int:
    """Run until it is interrupted; raises KVLabError, which the dispatcher turns into one line and exit status 2."""
    args = parser().parse_args(list(argv))
    if min(args.delay_ms, args.every_ms, args.limit) < 0:
        raise ConfigError("delay_ms, every_ms and limit must be 0 or more")
    faults = Faults([kind for kind in args.kinds.split(",") if kind], rate=args.rate, seed=args.seed)
    with _until_interrupted() as stop:
        _run(args, faults, stop)
    counts = {kind: faults.counts[kind] for kind in faults.kinds}
    if args.json:
        print_json({"seen": faults.seen, "faults": faults.total, **counts})
    else:
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        print(f"{faults.total} faults in {faults.seen} values: {said}")
    return 0


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """An event that ctrl-C and a request to end set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace, faults: Faults, stop: threading.Event) -> None:
    if args.what == "folder":
        if args.path is None:
            raise ConfigError("give the folder, like kvlab chaos folder /data/kv-to-break")
        FolderAgent(args.path, faults, delay_ms=args.delay_ms).run(every_ms=args.every_ms, limit=args.limit, stop=stop)
    else:
        if args.to is None:
            raise ConfigError("give the Redis behind the proxy, like --to 127.0.0.1:6379")
        host, port = _address("--listen", args.listen)
        with RedisProxy(_address("--to", args.to), faults, host=host, port=port, delay_ms=args.delay_ms) as proxy:
            print(f"listening at {proxy.host}:{proxy.port}", flush=True)
            stop.wait()


def _address(flag: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{flag} must be HOST:PORT, got {text!r}")
    return host, int(port)
