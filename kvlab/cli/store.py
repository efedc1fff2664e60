"""``kvlab store ls|info|verify|evict|clear URL``: look into a tier and tidy it."""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvlab.auth import AuthKey, auth_key
from kvlab.cli.parser import Parser
from kvlab.cli.show import BOLD, RED, print_json, styled
from kvlab.container import parse_json, unpack
from kvlab.errors import ConfigError, FormatError, StoreError
from kvlab.installed import found
from kvlab.stores import GROUP, Store, StoreURL, check_url, open_store
from kvlab.stores.base import Buffer
from kvlab.stores.disk.names import FANOUT, PRIVATE
from kvlab.stores.sealed import MOST_BYTES, read_object
from kvlab.units import format_bytes, parse_bytes

EXAMPLES = (
    "kvlab store ls file:///data/kv",
    "kvlab store info redis://host:6379 --json",
    "kvlab store verify file:///data/kv --quarantine",
    "kvlab store evict file:///data/kv --to 10GiB",
    "kvlab store clear file:///data/kv --yes",
)
MORE = """URLs: file:///path, redis://host:6379/0, unix:///run/redis.sock, redis-sentinel://..., redis-cluster://...,
s3://bucket/prefix
A folder is opened with its present size as budget unless the URL gives one (?size=10GiB), so looking evicts nothing."""
OF_OTHERS = frozenset({"version", "other_auth"})  # readers of another version, with another key or none, can use it


def parser() -> argparse.ArgumentParser:
    """The arguments of ``kvlab store``."""
    whole = Parser("kvlab store", "Look into a tier and tidy it.", examples=EXAMPLES, more=MORE)
    commands = whole.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    for name, (about, _) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.error = whole.error  # type: ignore[method-assign]
        command.add_argument("url", help="the store, for example file:///data/kv")
        command.add_argument("--json", action="store_true", help="print JSON instead of lines")
        if name == "ls":
            command.add_argument("--prefix", default="", help="only keys that start with this")
        if name == "verify":
            command.add_argument("--quarantine", action="store_true", help="put what is broken into quarantine")
            limit, told = f"{MOST_BYTES >> 30}GiB", "larger ones are not read (default: %(default)s)"
            command.add_argument("--largest", default=limit, metavar="SIZE", help=told)
            command.add_argument("--auth", metavar="FILE", help="the key that objects must be signed with")
        if name == "evict":
            command.add_argument("--to", required=True, metavar="SIZE", help="bytes that may stay, like 2GiB")
        if name == "clear":
            command.add_argument("--yes", action="store_true", help="do it; without this only the count is shown")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 fine, 1 something is broken, 2 wrong use or no access."""
    warned = _Warnings()
    logging.getLogger("kvlab").addHandler(warned)
    why = ""
    try:
        arguments = parser().parse_args(argv)
        try:
            with open_store(_looking_only(arguments.url)) as store:
                return COMMANDS[arguments.command][1](store, arguments)
        except (Exception, SystemExit) as error:
            scheme = arguments.url.partition(":")[0]
            if isinstance(error, ConfigError | StoreError) or not _is_of_a_package(scheme):
                raise
            # Not what it says: that may hold the URL's password.
            why = f"the store of {scheme}:// raised {type(error).__name__}; kvlab.testing.StoreTests says where"
            return 2
    except (ConfigError, StoreError) as error:
        why = str(error)
        return 2
    finally:
        logging.getLogger("kvlab").removeHandler(warned)
        lines = [line for line in dict.fromkeys(warned.lines) if line not in why]
        for line in [*lines, *([f"kvlab store: {why}"] if why else [])]:
            print(_shown(line), file=sys.stderr)


def _is_of_a_package(scheme: str) -> bool:
    """Whether another package brings the stores of these URLs: what they raise is theirs to mend."""
    return scheme in found(GROUP)


class _Warnings(logging.Handler):
    """What a store logs meanwhile; one that the error repeats is not shown twice."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _looking_only(url: str) -> str:
    """`url` with a budget nothing exceeds, if it is a folder without one: a look must not evict."""
    parsed = StoreURL.parse(url)
    if parsed.scheme == "memory":
        raise ConfigError("a memory store lives and ends with its process: there is nothing to look into")
    if parsed.scheme != "file":
        return url
    check_url(url)
    try:
        if not Path(parsed.path).is_dir():
            raise ConfigError(f"no folder {parsed.path!r}")
        if not {PRIVATE, *FANOUT} & {path.name for path in Path(parsed.path).iterdir()}:  # opening it would make one
            raise ConfigError(f"folder {parsed.path!r} holds no store: a store has a folder {PRIVATE} in it")
    except OSError as error:
        raise ConfigError(f"cannot look into {parsed.shown[:100]}: {error.strerror}") from error
    defaults = {"size": str((1 << 63) - 1), "check": "false"}
    extra = "&".join(f"{option}={value}" for option, value in defaults.items() if option not in parsed.options)
    return url.rstrip("?&") + ("&" if parsed.options else "?") + extra if extra else url


def _ls(store: Store, arguments: argparse.Namespace) -> int:
    found = {key: store.size_of(key) for key in sorted(store.keys()) if key.startswith(arguments.prefix)}
    sizes = {key: size for key, size in found.items() if size is not None}
    if arguments.json:
        print_json({"objects": [{"key": key, "bytes": size} for key, size in sizes.items()]})
        return 0
    for key, size in sizes.items():
        print(f"{size:>14,}  {_shown(key)}")
    print(styled(f"{len(sizes)} objects, {format_bytes(sum(sizes.values()))}", BOLD))
    return 0


def _info(store: Store, arguments: argparse.Namespace) -> int:
    count, total, named = Counter[str](), Counter[str](), dict[str, dict[str, str | int | None]]()
    for key in list(store.keys()):
        size = store.size_of(key)
        if size is not None:
            group = _group(key)
            count[group] += 1
            total[group] += size
            if group not in named:
                named[group] = _namespace(store, key)
    groups = sorted(total, key=lambda group: -total[group])
    differs = _differing(named)
    is_limited = store.max_bytes < 1 << 62
    if arguments.json:
        rows = [
            {"group": group, "objects": count[group], "bytes": total[group], "differs": differs[group]}
            for group in groups
        ]
        limit = store.max_bytes if is_limited else None
        print_json({"groups": rows, "store": store.name, "used_bytes": store.used_bytes, "max_bytes": limit})
        return 0
    for group in groups:
        fields = "".join(f"  {_shown(name)}={_shown(str(value)[:24])}" for name, value in differs[group].items())
        print(f"{count[group]:>8} objects  {format_bytes(total[group]):>12}  {_shown(group)}{fields}")
    used = f"{format_bytes(store.used_bytes)}{f' of {format_bytes(store.max_bytes)}' if is_limited else ''}"
    whole = f"{count.total():>8} objects  {format_bytes(total.total()):>12}  in all; {store.name} uses {used}"
    print(styled(whole, BOLD))
    return 0


def _namespace(store: Store, key: str) -> dict[str, str | int | None]:
    """The fields of an object's namespace, as it states them; none where it does not."""
    with suppress(FormatError, StoreError, KeyError, ValueError, RecursionError):
        found, error = read_object(store, key)
        fields = None if found is None or error is not None else parse_json(unpack(found, key).metadata["namespace"])
        if isinstance(fields, dict):
            return {str(name): value for name, value in fields.items() if isinstance(value, str | int | None)}
    return {}


def _differing(named: Mapping[str, Mapping[str, str | int | None]]) -> dict[str, dict[str, str | int | None]]:
    """Of namespaces, the fields that are not the same in all that state some: why one reader finds nothing of another's
    objects."""
    stated = [fields for fields in named.values() if fields]
    names = sorted({name for fields in stated for name in fields})
    differ = [name for name in names if len({fields.get(name) for fields in stated}) > 1]
    return {group: {name: fields[name] for name in differ if name in fields} for group, fields in named.items()}


def _verify(store: Store, arguments: argparse.Namespace) -> int:
    auth, most_bytes = auth_key(arguments.auth), parse_bytes(arguments.largest)
    reasons: Counter[str] = Counter()
    of_others: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    problems: list[dict[str, str]] = []
    num_bytes = sound = 0

    def tell(reason: str, key: str, why: str) -> None:
        problems.append({"reason": reason, "key": key, "why": why})
        if not arguments.json:
            print(f"{styled(reason, RED)}: {_shown(key)}: {_shown(why)}")

    for key in sorted(store.keys()):
        try:
            found, error = _look(store, key, auth, most_bytes)
            if error is not None:
                found = None  # let go of, as the second look takes as much memory
                store.renew()
                found, error = _look(store, key, auth, most_bytes)
        except StoreError as failed:
            unread[failed.reason] += 1
            tell(failed.reason, key, str(failed))
            continue
        num_bytes += 0 if found is None else memoryview(found).nbytes
        if error is not None:
            is_broken = error.reason not in OF_OTHERS
            (reasons if is_broken else of_others)[error.reason] += 1
            tell(error.reason, key, str(error))
            if arguments.quarantine and is_broken:
                store.quarantine(key, error.reason, found)
        elif found is not None:
            sound += 1
    if arguments.json:
        counts = {"sound": sound, "broken": reasons.total(), "for_others": of_others.total(), "unread": unread.total()}
        print_json({**counts, "read_bytes": num_bytes, "problems": problems})
        return 1 if reasons or unread else 0
    states = [f"{sound} objects are sound", f"{reasons.total()} broken{_listed(reasons)}"]
    if of_others:
        states.append(f"{of_others.total()} for other readers{_listed(of_others)}")
    if unread:
        states.append(f"{unread.total()} could not be read{_listed(unread)}")
    print(styled(f"{', '.join(states)}; read {format_bytes(num_bytes)}", BOLD))
    return 1 if reasons or unread else 0


def _listed(reasons: Counter[str]) -> str:
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f" ({listed})" if listed else ""


def _look(store: Store, key: str, auth: AuthKey | None, most_bytes: int) -> tuple[Buffer | None, FormatError | None]:
    """What was read of the object, None if it left meanwhile, and what is wrong with it."""
    found, error = read_object(store, key, most_bytes=most_bytes)
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
    if arguments.json:
        print_json({"removed": gone, "freed_bytes": freed, "objects": len(sizes) - gone, "bytes": total - freed})
        return 0
    stay = f"{len(sizes) - gone} objects, {format_bytes(total - freed)} stay"
    print(f"removed {gone} objects, {format_bytes(freed)}; {stay}")
    return 0


def _clear(store: Store, arguments: argparse.Namespace) -> int:
    """Every object, and what lies in quarantine."""
    keys = list(store.keys())
    aside = store.num_in_quarantine()
    if arguments.yes:
        keys = [key for key in keys if store.delete(key)]
        aside = store.clear_quarantine()
    if arguments.json:
        print_json({"done": arguments.yes, "objects": len(keys), "in_quarantine": aside})
        return 0
    what = f"{len(keys)} objects" + (f" and {aside} files in quarantine" if aside else "")
    print(f"removed {what}" if arguments.yes else f"{what} would be removed; say --yes to do it")
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
    "info": ("objects and bytes by model and namespace, fields in which namespaces differ, the budget", _info),
    "verify": ("read everything and name what is broken", _verify),
    "evict": ("remove the least recently used until SIZE stays", _evict),
    "clear": ("remove every object, and what lies in quarantine", _clear),
}
