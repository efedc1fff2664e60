"""The one byte format of every tier: a safetensors file whose header is padded so that data starts at byte 4,096.

`safetensors` opens a chunk as it is. kvlab's own fields stand in ``__metadata__``. The checksum covers every
byte, header included (its own hex digits read as zeros), and is checked together with format version, key and
lengths before anything is used. Layout: docs/format.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import xxhash

from kvlab.errors import FormatError

Buffer: TypeAlias = bytes | bytearray | memoryview

VERSION = "1"
ALIGNMENT = 4096  # direct I/O wants data at a page boundary
MAX_HEADER_BYTES = 1 << 20  # a header that claims more is hostile or broken; nothing is allocated for it
ITEM_BYTES = {
    "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8,
}  # fmt: skip
HASHED_AT_ONCE = 1 << 16
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{32})"')
_NO_CHECKSUM = b"0" * 32


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


def pack(key: str, parts: Mapping[str, Part], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """The object as buffers to be written one after the other: header, then each part's data, uncopied."""
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
    fields = {**(metadata or {}), "kvlab": VERSION, "key": key, "checksum": _NO_CHECKSUM.decode()}
    header = json.dumps({"__metadata__": fields, **entries}, separators=(",", ":")).encode()
    padded = -(-(8 + len(header)) // ALIGNMENT) * ALIGNMENT - 8
    head = padded.to_bytes(8, "little") + header.ljust(padded)
    data = [
        part.data.cast("B") if part.data.format != "B" or part.data.ndim != 1 else part.data for part in parts.values()
    ]
    digest = xxhash.xxh3_128()  # lets go of the interpreter: a save is in no hurry, and the engine waits for nobody
    pieces: list[Buffer] = [head, *data]
    for piece in pieces:
        digest.update(piece)
    at = head.index(b'"checksum":"' + _NO_CHECKSUM) + len(b'"checksum":"')
    return [head[:at] + digest.hexdigest().encode() + head[at + 32 :], *data]


def packed_bytes(value: Buffer | Sequence[Buffer]) -> int:
    """Length of a packed object on a medium."""
    pieces = [value] if isinstance(value, bytes | bytearray | memoryview) else value
    return sum(memoryview(piece).nbytes for piece in pieces)


def unpack(value: Buffer | Sequence[memoryview], key: str) -> Container:
    """Open an object, or raise FormatError with a one-word reason; no byte is used before all checks passed.

    Checked: lengths, header, format version, `key` (so that another object's content under this name is seen),
    checksum over every byte. Parts are views into `value`; where that is two buffers, into the second if this begins
    behind the header, else into a copy of both.
    """
    head, data = _head_and_data(value, key)
    num_bytes = len(head) + data.nbytes
    try:
        header = json.loads(head[8:])
        metadata = header.pop("__metadata__")
        if metadata["kvlab"] != VERSION:
            raise FormatError(
                f"object {key!r} has format version {metadata['kvlab']!r}, this kvlab reads {VERSION!r}",
                reason="version",
            )
        parts, end = _parts(header, data)
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"object {key!r} has a broken header: {error!r}"[:300]) from error
    if len(head) + end != num_bytes:
        raise FormatError(
            f"object {key!r} must hold {len(head) + end} bytes, got {num_bytes}",
            reason="truncated" if len(head) + end > num_bytes else "corrupt",
        )
    if metadata.get("key") != key:
        raise FormatError(f"object under {key!r} says it is {metadata.get('key')!r}"[:300], reason="wrong_key")
    found = _CHECKSUM.search(head)
    if found is None or found[1].decode() != metadata.get("checksum"):
        raise FormatError(f"object {key!r} carries no checksum")
    head = head[: found.start(1)] + _NO_CHECKSUM + head[found.end(1) :]
    if _digest(head, data) != metadata["checksum"]:
        raise FormatError(f"object {key!r} does not match its checksum", reason="checksum")
    return Container(parts, metadata)


def _head_and_data(value: Buffer | Sequence[memoryview], key: str) -> tuple[bytes, memoryview]:
    """The header with its length in front, and what follows it."""
    if not isinstance(value, bytes | bytearray | memoryview):
        first, *rest = value
        if len(rest) == 1 and first.nbytes >= 8 and 8 + int.from_bytes(first[:8], "little") == first.nbytes:
            return bytes(first), rest[0]
        value = b"".join(value)
    view = memoryview(value).cast("B")
    if view.nbytes < 8:
        raise FormatError(f"object {key!r} holds {view.nbytes} bytes, less than a header", reason="truncated")
    header_bytes = int.from_bytes(view[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise FormatError(f"object {key!r} claims a header of {header_bytes} bytes")
    if 8 + header_bytes > view.nbytes:
        raise FormatError(f"object {key!r} ends inside its header", reason="truncated")
    return bytes(view[: 8 + header_bytes]), view[8 + header_bytes :]


def _digest(*pieces: Buffer) -> str:
    """XXH3-128 of `pieces` in a row, for a load: in bites so small that xxhash keeps the interpreter, as to get it back
    from a busy engine takes up to 5 ms, and hashing 14 MiB 0.7."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, view.nbytes, HASHED_AT_ONCE):
            digest.update(view[at : at + HASHED_AT_ONCE])
    return digest.hexdigest()


def _parts(header: dict[str, Any], data: memoryview) -> tuple[dict[str, Part], int]:
    """Parts of a parsed header, which must follow each other without holes; and where the last one ends."""
    parts: dict[str, Part] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        sane = all(type(n) is int and 0 <= n < 1 << 48 for n in (start, stop, *shape))
        if not sane or start != end or stop - start != prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise FormatError(f"part {name!r} does not fit its place: {entry}"[:300])
        parts[name] = Part(entry["dtype"], shape, data[start:stop])
        end = stop
    return parts, end
