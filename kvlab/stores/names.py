"""File names of keys: readable by people, harmless whatever the key, and back again."""

import json
import zlib
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

SUFFIX = ".safetensors"
FANOUT = [f"{n:02x}" for n in range(256)]
NAME_CHARS = 200  # longer names are split into folders; file systems allow 255 bytes


@lru_cache(maxsize=1 << 16)
def path_of(key: str) -> str:
    """Where `key` lies under the root: ``3f/<percent-encoded key>.safetensors``.

    >>> path_of("kvlab:m:0:../x")
    '8d/kvlab:m:0:..%2Fx.safetensors'
    """
    raw = key.encode("utf-8", "surrogatepass")
    name = quote(raw, safe=":@+=,")
    pieces = [name[at : at + NAME_CHARS] for at in range(0, max(len(name), 1), NAME_CHARS)]
    return f"{zlib.crc32(raw) & 0xFF:02x}/{'/'.join(pieces)}{SUFFIX}"


def key_of(path: str) -> str | None:
    """The key that lies at `path`; None if no key lies there, because somebody else put the file."""
    if not path.endswith(SUFFIX):
        return None
    try:
        key = unquote_to_bytes(path[3 : -len(SUFFIX)].replace("/", "")).decode("utf-8", "surrogatepass")
    except ValueError:
        return None
    return key if path_of(key) == path else None


def is_cut_short(path: Path, size: int) -> bool:
    """Whether a file is empty, or starts like a safetensors file but is not as long as its header says.

    That is what a power cut leaves. Bytes of other kinds are none of our business: a reader checks them.
    """
    if size == 0:
        return True
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= 1 << 20:
            return False
        header = file.read(length)
    if not header.startswith(b"{"):
        return False
    try:
        parts = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return bool(8 + length + max((entry["data_offsets"][1] for entry in parts), default=0) != size)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return True
