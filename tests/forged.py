"""Objects as one who can write to a tier would make them: any header, any data, and a checksum that is right."""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from kvlab.container import VERSION
from kvlab.hostmemory import PAGE

SEAL = {"kvlab": VERSION, "bytes": "0" * 15, "checksum": "0" * 32, "mac": "0" * 64}


def header_of(value: bytes) -> dict[str, Any]:
    """The header of a stored object as JSON."""
    return dict(json.loads(value[8 : 8 + int.from_bytes(value[:8], "little")]))


def data_of(value: bytes) -> bytes:
    return value[8 + int.from_bytes(value[:8], "little") :]


def forged(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    """An object of this header, whatever its metadata says of the seal, and this data."""
    metadata = header.get("__metadata__", {})
    rest = {name: value for name, value in metadata.items() if name not in (*SEAL, "key")}
    entries = {name: value for name, value in header.items() if name != "__metadata__"}
    fields = {**SEAL, "key": metadata.get("key", ""), **rest}
    return forged_text(json.dumps({"__metadata__": fields, **entries}, separators=(",", ":")).encode(), data)


def forged_text(text: bytes, data: bytes = b"") -> bytes:
    """As `forged`, of a header that need not be JSON but must begin with a seal of zeros."""
    padded = -(-(8 + len(text)) // PAGE) * PAGE - 8
    head = padded.to_bytes(8, "little") + text.ljust(padded)
    head = head.replace(b'"bytes":"' + b"0" * 15, b'"bytes":"%015d' % (len(head) + len(data)), 1)
    mark = b'"checksum":"'
    at = head.index(mark + b"0" * 32) + len(mark)
    return head[:at] + xxhash.xxh3_128(head + data).hexdigest().encode() + head[at + 32 :] + data


def seal_text(key: str) -> bytes:
    """The beginning of a header, up to and including its key."""
    return json.dumps({"__metadata__": {**SEAL, "key": key}}, separators=(",", ":")).encode()[:-2]
