"""``kvlab store ls|info|verify|evict|clear URL``: look into a tier and tidy it."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from kvlab.auth import AuthKey, auth_key
from kvlab.cli.parser import Parser
from kvlab.container import parse_json, unpack
from kvlab.errors import ConfigError, FormatError, StoreError
from kvlab.stores import Store, StoreURL, open_store
from kvlab.stores.base import Buffer
from kvlab.stores.sealed import read_object
from kvlab.units import format_bytes, parse_bytes

EPILOG = """URLs: file:///path, redis://host:6379/0, unix:///run/redis.sock, redis-sentinel://..., redis-cluster://...
A folder is opened with its present size as budget unless the URL gives one (?size=10GiB), so looking evicts nothing."""
OF_OTHERS = frozenset({"version", "other_auth"})  # readers of another version, with another key or none, can use it


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 fine, 1 something is broken, 2 wrong use or no access."""
    parser = Parser(
        prog="kvlab store", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (about, _) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("url", help="the store, for example file:///data/kv")
        if name == "ls":
            command.add_argument("--prefix", default="", help="only keys that start with this")
        if name == "verify":
            command.add_argument("--quarantine", action="store_true", help="put what is broken into quarantine")
            command.add_argument("--auth", metavar="FILE", help="the key that objects must be signed with")
        if name == "evict":
            command.add_argument("--to", required=True, metavar="SIZE", help="bytes that may stay, like 2GiB")
        if name == "clear":
            command.add_argument("--yes", action="store_true", help="do it; without this only the count is shown")
    arguments = parser.parse_args(argv)
    try:
        with open_store(_looking_only(arguments.url)) as store:
            return COMMANDS[arguments.command][1](store, arguments)
    except (ConfigError, StoreError) as error:
        print(f"kvlab store: {_shown(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0


def _looking_only(url: str) -> str:
    """`url` with a budget nothing exceeds, if it is a folder without one: a look must not evict."""
    parsed = StoreURL.parse(url)
    if parsed.scheme == "memory":
        raise ConfigError("a memory store lives and ends with its process: there is nothing to look into")
    if parsed.scheme != "file":
        return url
    try:
        if not Path(parsed.path).is_dir():
            raise ConfigError(f"no folder {parsed.path!r}")
    except OSError as error:
        raise ConfigError(f"cannot look into {parsed.shown[:100]}: {error.strerror}") from error
    defaults = {"size": str((1 << 63) - 1), "check": "false"}
    extra = "&".join(f"{option}={value}" for option, value in defaults.items() if option not in parsed.options)
    return url.rstrip("?&") + ("&" if parsed.options else "?") + extra if extra else url


def _ls(store: Store, arguments: argparse.Namespace) -> int:
    total = count = 0
    for key in sorted(store.keys()):
        if not key.startswith(arguments.prefix):
            continue
        size = store.size_of(key)
        if size is not None:
            print(f"{size:>14,}  {_shown(key)}")
            total, count = total + size, count + 1
    print(f"{count} objects, {format_bytes(total)}")
    return 0


def _info(store: Store, arguments: argparse.Namespace) -> int:
    count, total = Counter[str](), Counter[str]()
    for key in list(store.keys()):
        size = store.size_of(key)
        if size is not None:
            group = _group(key)
            count[group] += 1
            total[group] += size
    for group in sorted(total, key=lambda group: -total[group]):
        print(f"{count[group]:>8} objects  {format_bytes(total[group]):>12}  {_shown(group)}")
    limit = f" of {format_bytes(store.max_bytes)}" if store.max_bytes < 1 << 62 else ""
    print(
        f"{sum(count.values()):>8} objects  {format_bytes(sum(total.values())):>12}  in all; {store.name} uses ", end=""
    )
    print(f"{format_bytes(store.used_bytes)}{limit}")
    return 0


def _verify(store: Store, arguments: argparse.Namespace) -> int:
    auth = auth_key(arguments.auth)
    reasons: Counter[str] = Counter()
    of_others: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    num_bytes = sound = 0
    for key in sorted(store.keys()):
        try:
            found, error = _look(store, key, auth)
            if error is not None:
                found = None  # let go of, as the second look takes as much memory
                store.renew()
                found, error = _look(store, key, auth)
        except StoreError as failed:
            unread[failed.reason] += 1
            print(f"{failed.reason}: {_shown(key)}: {_shown(str(failed))}")
            continue
        num_bytes += 0 if found is None else memoryview(found).nbytes
        if error is not None:
            is_broken = error.reason not in OF_OTHERS
            (reasons if is_broken else of_others)[error.reason] += 1
            print(f"{error.reason}: {_shown(key)}: {_shown(str(error))}")
            if arguments.quarantine and is_broken:
                store.quarantine(key, error.reason, found)
        elif found is not None:
            sound += 1
    states = [f"{sound} objects are sound", f"{sum(reasons.values())} broken{_listed(reasons)}"]
    if of_others:
        states.append(f"{sum(of_others.values())} for other readers{_listed(of_others)}")
    if unread:
        states.append(f"{sum(unread.values())} could not be read{_listed(unread)}")
    print(f"{', '.join(states)}; read {format_bytes(num_bytes)}")
    return 1 if reasons or unread else 0


def _listed(reasons: Counter[str]) -> str:
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f" ({listed})" if listed else ""


def _look(store: Store, key: str, auth: AuthKey | None) -> tuple[Buffer | None, FormatError | None]:
    """What was read of the object, None if it left meanwhile, and what is wrong with it."""
    found, error = read_object(store, key)
    if found is None or error is not None:
        return found, error
    try:
        unpack(found, key, auth=auth)
    except FormatError as wrong:
        is_of_others = wrong.reason == "auth" and auth is not None and not _is_of(found, key, auth)
        return found, FormatError(str(wrong), reason="other_auth") if is_of_others else wrong
    return found, None


def _is_of(value: Buffer, key: str, auth: AuthKey) -> bool:
    """Whether an object says that its readers want it to be signed with this key."""
    with suppress(FormatError, KeyError, ValueError, RecursionError):
        namespace = parse_json(unpack(value, key).metadata["namespace"])
        return isinstance(namespace, dict) and namespace.get("auth") == auth.id
    return True


def _evict(store: Store, arguments: argparse.Namespace) -> int:
    """Oldest first: a fresh store knows the order of last use from the medium, and `keys` gives it."""
    allowed = parse_bytes(arguments.to)
    sizes = {key: store.size_of(key) or 0 for key in list(store.keys())}
    total, gone, freed = sum(sizes.values()), 0, 0
    for key, size in sizes.items():
        if total - freed <= allowed:
            break
        if store.delete(key):
            gone, freed = gone + 1, freed + size
    stay = f"{len(sizes) - gone} objects, {format_bytes(total - freed)} stay"
    print(f"removed {gone} objects, {format_bytes(freed)}; {stay}")
    return 0


def _clear(store: Store, arguments: argparse.Namespace) -> int:
    keys = list(store.keys())
    if not arguments.yes:
        print(f"{len(keys)} objects would be removed; say --yes to do it")
        return 0
    removed = sum(store.delete(key) for key in keys)
    print(f"removed {removed} objects")
    return 0


def _group(key: str) -> str:
    """Model and namespace of one of kvlab's keys; others are one group."""
    parts = key.split(":")
    return ":".join(parts[:3]) if len(parts) == 4 and parts[0] == "kvlab" else "(other keys)"


def _shown(key: str) -> str:
    """`key` with what would upset a terminal escaped."""
    return key.encode("unicode_escape", "surrogatepass").decode() if not key.isprintable() else key


COMMANDS: dict[str, tuple[str, Callable[[Store, argparse.Namespace], int]]] = {
    "ls": ("list keys and sizes", _ls),
    "info": ("objects and bytes by model and namespace, and the budget", _info),
    "verify": ("read everything and name what is broken", _verify),
    "evict": ("remove the least recently used until SIZE stays", _evict),
    "clear": ("remove every object", _clear),
}
