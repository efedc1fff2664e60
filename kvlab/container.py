"""The one byte format of every tier: a safetensors file whose header is padded so that data starts at byte 4,096.

`safetensors` opens a chunk as it is. kvlab's own fields stand in ``__metadata__``, and the first of them, the *seal*,
at fixed places: format version, length, a checksum and a MAC over every byte, header included. So a reader checks
the bytes before it interprets any of them, and then within limits. Layout: docs/design/container.md.
"""

import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import xxhash

from kvlab.auth import AuthKey
from kvlab.errors import ConfigError, FormatError
from kvlab.hostmemory import PAGE

Buffer: TypeAlias = bytes | bytearray | memoryview

VERSION = "2"
# Limits of a header. The largest that a kind of kvlab writes has 12 parts and 2 KB besides key and namespace.
MAX_HEADER_BYTES = 16 << 10
MAX_PARTS = 64
MAX_DIMS = 8
MAX_DIGITS = 15
MAX_ELEMENTS = 1 << 47  # of a part, an empty axis counted as one: strides are computed for those too
ITEM_BYTES = {
    "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8,
}  # fmt: skip
_START = b'{"__metadata__":{"kvlab":"'
_SEAL = re.compile(
    re.escape(_START + VERSION.encode())
    + rb'","bytes":"([0-9]{15})","checksum":"([0-9a-f]{32})","mac":"([0-9a-f]{64})","key":"'
)
_BYTES, _CHECKSUM, _MAC = 1, 2, 3  # groups of the pattern
_BLANK = {"kvlab": VERSION, "bytes": "0" * MAX_DIGITS, "checksum": "0" * 32, "mac": "0" * 64}
_NO_MAC = _BLANK["mac"].encode()
SEAL_BYTES = 8 + len(_START) + len('2","bytes":"","checksum":"","mac":"","key":"') + MAX_DIGITS + 32 + 64


@dataclass(frozen=True)
class Part:
    """One named array of a container: safetensors dtype name, shape, and its bytes (row-major)."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Container:
    """An opened object: its parts by name and kvlab's metadata."""

    parts: dict[str, Part]
    metadata: dict[str, str]


def pack(
    key: str, parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None, *, auth: AuthKey | None = None
) -> list[Buffer]:
    """The object as buffers to be written one after the other: header, then each part's data, uncopied.

    With `auth` it carries a MAC. Raises FormatError for a part whose data does not fit its shape, ConfigError where the
    header would be longer than a reader takes.
    """
    entries: dict[str, Any] = {}
    offset = 0
    for name, part in parts.items():
        size = part.nbytes
        if part.data.nbytes != size:
            raise FormatError(
                f"part {name!r} must hold {size} bytes for {part.dtype}{list(part.shape)}, got {part.data.nbytes}"
            )
        entries[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [offset, offset + size]}
        offset += size
    fields = {**_BLANK, "key": key, **(metadata or {})}
    if len(fields) != len(_BLANK) + 1 + len(metadata or {}):
        raise ConfigError(f"metadata must not use the names of the seal: {', '.join(_BLANK)}, key")
    text = json.dumps({"__metadata__": fields, **entries}, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // PAGE) * PAGE - 8
    if padded > MAX_HEADER_BYTES:
        raise ConfigError(
            f"the header of an object must fit {MAX_HEADER_BYTES} bytes, this one has {len(text)}; "
            "shorten its key or its namespace"
        )
    head = bytearray(padded.to_bytes(8, "little") + text.ljust(padded))
    data = [
        part.data.cast("B") if part.data.format != "B" or part.data.ndim != 1 else part.data for part in parts.values()
    ]
    seal = _SEAL.match(head, 8)
    assert seal is not None, "pack writes what unpack looks for"
    places = {group: slice(*seal.span(group)) for group in (_BYTES, _CHECKSUM, _MAC)}
    del seal  # it holds on to `head`
    head[places[_BYTES]] = b"%0*d" % (MAX_DIGITS, len(head) + offset)
    if auth is not None:
        head[places[_MAC]] = auth.mac([bytes(head), *data]).encode()
    head[places[_CHECKSUM]] = _digest(bytes(head), *data).encode()
    return [bytes(head), *data]


def packed_bytes(value: Buffer | Sequence[Buffer]) -> int:
    """Length of a packed object on a medium."""
    pieces = [value] if isinstance(value, bytes | bytearray | memoryview) else value
    return sum(memoryview(piece).nbytes for piece in pieces)


def unpack(
    value: Buffer | Sequence[memoryview], key: str, *, auth: AuthKey | None = None, is_sealed: bool = False
) -> Container:
    """Open an object, or raise FormatError with a one-word reason; no byte is used before all checks passed.

    Checked, in this order: format version, length, the checksum over every byte, where `auth` is given the MAC too;
    then the header, within the limits above, and `key`, so that another object's content under this name is seen. A
    MAC that the reader has no key for is passed over. Parts are views into `value`; where that is two buffers, into
    the second if this begins behind the header, else into a copy of both. `is_sealed`: the same bytes passed checksum
    and MAC before, with this `auth`, and are not read again.
    """
    head, data = _head_and_data(value, key)
    seal = check_length(head, len(head) + data.nbytes, key)
    if not is_sealed:
        _check_seal(seal, head, data, key, auth)
    metadata, entries = _header(head, key)
    if metadata["key"] != key:
        raise FormatError(f"object under {key!r} says it is {metadata['key']!r}"[:300], reason="wrong_key")
    return Container(_parts(entries, data, key), metadata)


def check_length(head: bytes, num_bytes: int, key: str) -> re.Match[bytes]:
    """The seal of an object of `num_bytes` that begins with `head`; FormatError unless it says that it is so long."""
    header_bytes = _header_bytes(head[:8], num_bytes, key)
    seal = _SEAL.match(head, 8, 8 + header_bytes)
    if seal is None:
        known = head.startswith(_START, 8) and not head.startswith(VERSION.encode() + b'"', 8 + len(_START))
        reason = "version" if known else "corrupt"
        raise FormatError(f"object {key!r} does not begin as format {VERSION} does", reason=reason)
    said = int(seal[_BYTES])
    if said != num_bytes:
        reason = "truncated" if said > num_bytes else "corrupt"
        raise FormatError(f"object {key!r} must hold {said} bytes, got {num_bytes}", reason=reason)
    return seal


def is_cut_short(head: bytes, num_bytes: int) -> bool:
    """Whether a file of `num_bytes` begins as an object does and is not as long as that says, as after a power cut;
    `head` is its first `SEAL_BYTES`. Bytes of other kinds are not judged: a reader checks them."""
    seal = _SEAL.match(head, 8)
    if seal is not None:
        return int(seal[_BYTES]) != num_bytes
    return 8 < num_bytes < SEAL_BYTES and (head.startswith(_START, 8) or _START.startswith(head[8:]))


def parse_json(text: str) -> Any:
    """The value of JSON that others wrote; ValueError or RecursionError where it is none. No number has more than
    `MAX_DIGITS` digits: Python reads a long one in time that grows with its square."""
    return _DECODER.decode(text)


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_int=_int, parse_constant=_constant)  # to make one takes as long as to use it


def _head_and_data(value: Buffer | Sequence[memoryview], key: str) -> tuple[bytes, memoryview]:
    """The header with its length in front, and what follows it."""
    if not isinstance(value, bytes | bytearray | memoryview):
        first, *rest = value
        header_bytes = int.from_bytes(first[:8], "little") if first.nbytes >= 8 else -1
        if len(rest) == 1 and 8 + header_bytes == first.nbytes and header_bytes <= MAX_HEADER_BYTES:
            return bytes(first), rest[0]
        value = b"".join(value)
    view = memoryview(value).cast("B")
    end = 8 + _header_bytes(view[:8], view.nbytes, key)
    return bytes(view[:end]), view[end:]


def _header_bytes(start: Buffer, num_bytes: int, key: str) -> int:
    """How long the header says it is, of an object of `num_bytes`; `start` is its first 8."""
    if num_bytes < 8:
        raise FormatError(f"object {key!r} holds {num_bytes} bytes, less than a header", reason="truncated")
    header_bytes = int.from_bytes(start, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise FormatError(f"object {key!r} claims a header of {header_bytes} bytes")
    if 8 + header_bytes > num_bytes:
        raise FormatError(f"object {key!r} ends inside its header", reason="truncated")
    return header_bytes


def _check_seal(seal: re.Match[bytes], head: bytes, data: memoryview, key: str, auth: AuthKey | None) -> None:
    """FormatError unless the bytes are those that were sealed. The checksum is of all bytes with zeros for its own
    digits, the MAC of all with zeros for both. Beside a MAC the checksum costs little, and tells accidents from
    forgeries."""
    head = _without(head, seal, _CHECKSUM)
    if _digest(head, data) != seal[_CHECKSUM].decode():
        raise FormatError(f"object {key!r} does not match its checksum", reason="checksum")
    if auth is None:
        return
    if seal[_MAC] == _NO_MAC:
        raise FormatError(f"object {key!r} carries no MAC, and this reader wants one", reason="auth")
    if not hmac.compare_digest(auth.mac((_without(head, seal, _MAC), data)), seal[_MAC].decode()):
        raise FormatError(f"object {key!r} was not sealed with key {auth.id}, or was changed", reason="auth")


def _without(head: bytes, seal: re.Match[bytes], group: int) -> bytes:
    """The header with zeros for this field of its seal."""
    start, end = seal.span(group)
    return head[:start] + b"0" * (end - start) + head[end:]


def _digest(*pieces: Buffer) -> str:
    """XXH3-128 of `pieces` in a row; other threads run meanwhile."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _header(head: bytes, key: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and entries of the parts."""
    try:
        entries = parse_json(head[8:].decode())
        metadata = entries.pop("__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"object {key!r} has a broken header: {error!r}"[:300]) from error
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FormatError(f"object {key!r} has metadata that is not text")
    if len(entries) > MAX_PARTS:
        raise FormatError(f"object {key!r} has {len(entries)} parts, more than {MAX_PARTS}")
    if not isinstance(metadata.get("key"), str):
        raise FormatError(f"object {key!r} does not say its key")
    return metadata, entries


def _parts(entries: dict[str, Any], data: memoryview, key: str) -> dict[str, Part]:
    """The parts, which must fill `data` one after the other without holes."""
    parts: dict[str, Part] = {}
    end = 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            if len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
                raise ValueError(f"part {name!r} has no such place: {entry}")
            spread = prod(max(n, 1) for n in shape)
            if start != end or spread > MAX_ELEMENTS or stop - start != prod(shape) * ITEM_BYTES[entry["dtype"]]:
                raise ValueError(f"part {name!r} does not fit its place: {entry}")
            parts[name] = Part(entry["dtype"], shape, data[start:stop])
            end = stop
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"object {key!r} has a broken header: {error!r}"[:300]) from error
    if end != data.nbytes:
        raise FormatError(f"the parts of object {key!r} hold {end} of its {data.nbytes} bytes of data")
    return parts
