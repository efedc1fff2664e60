"""What an engine asks of its tier worker. Every field is checked where it is read: a peer may send anything."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Self

from kvlab.errors import ConfigError, KVLabError, StoreError
from kvlab.hashing import HASH_BYTES
from kvlab.tierworker.link import LinkError, Message

MAX_ID = 10**15 - 1  # as many digits as are read
MAX_VERSION = 64  # characters of a namespace's version
MAX_NAME = 4096  # characters of a path, a URL or the name of a serde
MAX_TIERS, MAX_RANKS = 64, 1024
MAX_GIVEN_BACK = 1 << 16  # objects at once
MAX_ELEMENTS = 1 << 24  # of a page that is coded: its map takes memory for each

Runs = tuple[tuple[int, int], ...]  # (first slot, number of slots)


def runs_of(slots: Sequence[int]) -> Runs:
    """Runs of neighbouring slots, in order."""
    found: list[tuple[int, int]] = []
    for slot in slots:
        if found and slot == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((slot, 1))
    return tuple(found)


@dataclass(frozen=True)
class Place:
    """An object of one rank, under a version of its namespace, and the slots it is to lie in."""

    id: int
    rank: int
    version: str
    hash: str
    runs: Runs
    first_token: int
    end_token: int

    @property
    def num_slots(self) -> int:
        return sum(count for _, count in self.runs)


@dataclass(frozen=True)
class Fill(Place):
    """Fill the slots with the object; or, with `lend`, say where it lies in the server's memory, and leave it there
    until the engine says ``give_back``."""

    lend: bool = False


@dataclass(frozen=True)
class Write(Place):
    """Write the object to the tiers, once saves up to `after` are in their slots, which are of `generation`."""

    generation: int = 0
    after: int = 0


@dataclass(frozen=True)
class Ask:
    """Which objects of a prompt the tiers hold: `num_hashes` of blocks, in chunks of `chunk_blocks`; with `has_last`,
    one more for a last block that the prompt fills in part. The hashes follow as bytes, then a byte for each but the
    last: 1 where host memory holds the object."""

    id: int
    version: str
    chunk_blocks: int
    num_hashes: int
    has_last: bool


@dataclass(frozen=True)
class Opening:
    """The first message: what the tiers are, and under which names objects lie in them. `auth` is the path of a key's
    file, `slots` the codec of what slots hold, ``naive`` where they hold pages as they are."""

    tiers: list[str]
    serde: str
    auth: str | None
    namespaces: list[dict[str, Any]]  # model and fields, one for each rank
    slots: str = "naive"

    @classmethod
    def of(cls, message: Message) -> Self:
        tiers, namespaces = _list(message, "tiers", MAX_TIERS), _list(message, "namespaces", MAX_RANKS)
        if not all(_is_text(url) for url in tiers):
            raise LinkError("a message's tiers must be texts")
        if not namespaces or not all(_is_namespace(each) for each in namespaces):
            raise LinkError("a message's namespaces must each have a model and fields")
        auth = message.get("auth")
        if auth is not None and not (_is_text(auth) and auth):  # a number would be an open file of this process
            raise LinkError("a message's auth must be a path, or none")
        return cls(tiers, text_of(message, "serde"), auth, namespaces, text_of(message, "slots"))


@dataclass(frozen=True)
class Memory:
    """The slots that the engine shares; the descriptor of their memory comes with the message. `page_map`: what lies
    where in a page, for tiers that code what slots hold as it is."""

    num_slots: int
    layers: int
    page_bytes: int
    page_map: dict[str, Any] | None = None

    @classmethod
    def of(cls, message: Message) -> Self:
        most = 1 << 40
        slots, layers, size = (_number(message, name, most) for name in ("num_slots", "layers", "page_bytes"))
        if not 0 < slots * layers * size <= 1 << 48:
            raise LinkError("a message names memory of no possible size")
        page_map = message.get("page_map")
        if page_map is not None and not _is_page_map(page_map, size):
            raise LinkError(f"a message's page_map must tell of pages of {size} bytes")
        return cls(slots, layers, size, page_map)

    @property
    def num_elements(self) -> int:
        """Of a page, by its map."""
        return sum(prod(map(len, plane)) for plane in self.page_map["planes"]) if self.page_map else 0


def message_of(request: Fill | Write | Ask | Opening | Memory) -> Message:
    return {"op": type(request).__name__.lower(), **asdict(request)}


def place_of(message: Message, *, num_slots: int, num_ranks: int) -> Fill | Write:
    """The request in `message`; LinkError unless its slots are some of `num_slots`."""
    runs, left = message.get("runs"), num_slots
    if not isinstance(runs, list) or not runs:
        raise LinkError("a message must name slots")
    checked: list[tuple[int, int]] = []
    for run in runs:
        if not isinstance(run, list) or len(run) != 2 or not all(type(n) is int for n in run):
            raise LinkError("a run of slots must be two numbers")
        first, count = run
        left -= count
        if count < 1 or first < 0 or first + count > num_slots or left < 0:
            raise LinkError(f"a message names slots [{first}, {first + count}) of {num_slots}")
        checked.append((first, count))
    name = message.get("hash")
    if not isinstance(name, str) or len(name) != 2 * HASH_BYTES or not all(c in "0123456789abcdef" for c in name):
        raise LinkError("a hash must be given in hex")
    first_token, end_token = _number(message, "first_token"), _number(message, "end_token")
    if first_token >= end_token:
        raise LinkError(f"an object must hold tokens, got [{first_token}, {end_token})")
    rank = _number(message, "rank", num_ranks - 1)
    values = (_number(message, "id"), rank, _version(message), name, tuple(checked), first_token, end_token)
    if message["op"] == "fill":
        return Fill(*values, lend=message.get("lend") is True)
    return Write(*values, generation=_number(message, "generation"), after=_number(message, "after"))


def given_back(message: Message) -> list[int]:
    """The requests whose objects are not used any more."""
    numbers = _list(message, "ids", MAX_GIVEN_BACK)
    if not all(type(number) is int for number in numbers):
        raise LinkError("what is given back must be named by numbers")
    return numbers


def ask_of(message: Message, data: bytes) -> tuple[Ask, list[bytes], bytes | None, bytes]:
    """The question in `message`: itself, the hashes, the last block's, and the flags."""
    number, step = _number(message, "num_hashes", 1 << 20), _number(message, "chunk_blocks", 1 << 20)
    has_last = message.get("has_last") is True
    if step < 1 or len(data) != (number + has_last) * HASH_BYTES + number:
        raise LinkError("a question's hashes do not fit their number")
    hashes = [data[at : at + HASH_BYTES] for at in range(0, number * HASH_BYTES, HASH_BYTES)]
    end = (number + has_last) * HASH_BYTES
    last = data[end - HASH_BYTES : end] if has_last else None
    return Ask(_number(message, "id"), _version(message), step, number, has_last), hashes, last, data[end:]


def failure(error: BaseException) -> Message:
    """What could not be opened, and why."""
    kind = "config" if isinstance(error, ConfigError) else getattr(error, "reason", "failed")
    text = str(error) if isinstance(error, KVLabError) else f"{type(error).__name__}: {error}"
    return {"op": "failed", "kind": str(kind), "error": text}


def raised_by(message: Message) -> KVLabError:
    """The error that `failure` told of."""
    text, kind = str(message.get("error", "no reason was given")), str(message.get("kind", "failed"))
    return ConfigError(text) if kind == "config" else StoreError(text, reason=kind)


def _number(message: Message, name: str, most: int = MAX_ID) -> int:
    value = message.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise LinkError(f"a message's {name} must be an integer from 0 to {most}")
    return value


def _version(message: Message) -> str:
    value = message.get("version")
    if not isinstance(value, str) or len(value) > MAX_VERSION or not value.isascii():
        raise LinkError("a message's version must be a short text")
    return value


def text_of(message: Message, name: str) -> str:
    """The text of this name in `message`; LinkError where it is none, or a long one."""
    value = message.get(name)
    if not isinstance(value, str) or not _is_text(value):
        raise LinkError(f"a message's {name} must be a text of at most {MAX_NAME} characters")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and "\0" not in value


def _list(message: Message, name: str, most: int) -> list[Any]:
    value = message.get(name)
    if not isinstance(value, list) or len(value) > most:
        raise LinkError(f"a message's {name} must be a list of at most {most}")
    return value


def _is_namespace(value: object) -> bool:
    """Whether it is a model and fields as `kvlab.hashing.Namespace` takes them, which bounds their length itself."""
    if not isinstance(value, dict) or set(value) != {"model", "fields"} or not isinstance(value["model"], str):
        return False
    fields = value["fields"]
    return isinstance(fields, dict) and all(each is None or type(each) in (str, int, bool) for each in fields.values())


def _is_page_map(value: object, page_bytes: int) -> bool:
    """Whether it has the form that `kvlab.paged.typed.PageMap` reads, for pages of this size and of no more elements
    than are coded: what is made of it grows with their number, not with the message."""
    if not isinstance(value, dict) or set(value) != {"name", "element", "page_bytes", "planes"}:
        return False
    planes = value["planes"]
    if not isinstance(value["name"], str) or not isinstance(value["element"], str) or not isinstance(planes, list):
        return False
    if type(value["page_bytes"]) is not int or value["page_bytes"] != page_bytes or not 1 <= len(planes) <= 2:
        return False
    for plane in planes:
        if not isinstance(plane, list) or len(plane) != 3 or not all(isinstance(table, list) for table in plane):
            return False
        if not all(type(place) is int for table in plane for place in table):
            return False
    return sum(prod(map(len, plane)) for plane in planes) <= min(page_bytes, MAX_ELEMENTS)
