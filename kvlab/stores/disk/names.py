"""File names of keys: readable by people, safe for any key, and reversible."""

import re
import zlib
from functools import lru_cache
from urllib.parse import quote, unquote_to_bytes

SUFFIX = ".safetensors"
FANOUT = [f"{n:02x}" for n in range(256)]
NAME_CHARS = 200  # longer names are split into folders; file systems allow 255 bytes
PRIVATE = ".kvlab"
WRITING = f"{PRIVATE}/writing"
BROKEN = f"{PRIVATE}/broken"
_PRIVATE_FILE = re.compile(
    rf"{re.escape(WRITING)}/[0-9a-f]{{16}}|{re.escape(BROKEN)}/[0-9a-f]{{8}}-[\w.%:@+=,~-]{{1,240}}", re.A
)


@lru_cache(maxsize=1 << 16)
def path_of(key: str) -> str:
    """Where `key` lies under the root: ``3f/<percent-encoded key>.safetensors``. Long names are cut into folders, which
    end with a ``%`` as no file does.

    >>> path_of("kvlab:m:0:../x")
    '8d/kvlab:m:0:..%2Fx.safetensors'
    """
    raw = key.encode("utf-8", "surrogatepass")
    name = quote(raw, safe=":@+=,")
    pieces = [name[at : at + NAME_CHARS] for at in range(0, max(len(name), 1), NAME_CHARS)]
    return f"{zlib.crc32(raw) & 0xFF:02x}/{'%/'.join(pieces)}{SUFFIX}"


def key_of(path: str) -> str | None:
    """The key that lies at `path`; None if no key's file has this path: another program made it."""
    if not path.endswith(SUFFIX):
        return None
    try:
        key = unquote_to_bytes(path[3 : -len(SUFFIX)].replace("%/", "")).decode("utf-8", "surrogatepass")
    except ValueError:
        return None
    return key if path_of(key) == path else None


def is_own(path: str) -> bool:
    """Whether a store gives files this path: an object, a file in the making, or one set aside. Nothing else is ever
    counted, moved or removed.

    >>> is_own("../../home/thesis.txt"), is_own(".kvlab/writing/00112233aabbccdd")
    (False, True)
    """
    return _PRIVATE_FILE.fullmatch(path) is not None or key_of(path) is not None
