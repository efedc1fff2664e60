"""What a store's keys are called on a Redis server, and what its commands' replies must look like."""

from typing import TypeAlias

from kvlab.stores.base import fits_key
from kvlab.stores.redis.resp import Reply, ReplyError, array, bulk, text
from kvlab.stores.wire import ProtocolError

PREFIX = b"kvlab:"
FOREIGN = b"kvlab::"  # keys that do not start with PREFIX are stored under this
Answers: TypeAlias = list[int | ReplyError]  # to the commands about one key
SIZE = ("EXISTS", "STRLEN")  # which tell an empty value from none, and a value from another program's list
MOST_FACTS_BYTES = 64 << 10  # of INFO's part on memory, which has some 3 KiB


def name_of(key: str) -> bytes:
    """The Redis key of `key`: itself if it is one of kvlab's, else marked, so that nothing else is ever touched."""
    raw = key.encode("utf-8", "surrogatepass")
    return raw if raw.startswith(PREFIX) and not raw.startswith(FOREIGN) else FOREIGN + raw


def key_of(name: bytes) -> str | None:
    """The key that is stored as `name`; None where another program has made a name that no key has."""
    raw = name[len(FOREIGN) :] if name.startswith(FOREIGN) else name
    try:
        key = raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return key if fits_key(key) and name_of(key) == name else None


def scanned(reply: Reply) -> tuple[bytes, list[str]]:
    """The next cursor of SCAN, and the keys among the names."""
    cursor, names = array(reply, 2)[:2]
    return bulk(cursor), [key for name in array(names) if (key := key_of(bulk(name))) is not None]


def size_in(answers: Answers) -> int | None:
    """What the answers to `SIZE` say of a value: its length, or None if there is none."""
    there, size = answers or (0, 0)
    return size if there == 1 and isinstance(size, int) else None


def memory_facts(reply: Reply) -> dict[str, int]:
    """What INFO says of the memory in use, of what there is, and whether that has no limit of its own."""
    told = text(reply)
    if len(told) > MOST_FACTS_BYTES:
        raise ProtocolError(f"the server told {len(told)} characters about its memory")
    pairs = (line.partition(":") for line in told.split("\r\n"))
    facts = {name: int(value) for name, _, value in pairs if _is_count(value)}
    maxmemory = facts.get("maxmemory", 0)
    return {
        "used_bytes": facts.get("used_memory", 0),
        "max_bytes": maxmemory or facts.get("total_system_memory", 0),
        "unbounded": int(not maxmemory),
    }


def told_limit(reply: Reply) -> int:
    """The value of a CONFIG GET of one number; 0 if the server does not have it."""
    told = array(reply)
    value = text(told[1]) if len(told) > 1 else ""
    return int(value) if _is_count(value) else 0


def _is_count(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < 19
