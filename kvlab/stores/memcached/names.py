"""What keys are called in memcached: at most 250 bytes without spaces.

A key that is longer lies under its digest, and stands before its value: the item's flags are its length there.
"""

import hashlib
from urllib.parse import quote, unquote_to_bytes

from kvlab.stores.base import fits_key

OURS = "kvlab/"  # begins every name
MOST_NAME = 250
MOST_PREFIX = 120
_DIGEST = "="  # no quoted key begins with it


def name_of(prefix: str, key: str) -> tuple[bytes, bytes]:
    """The name under `prefix`, which is empty or ends with a slash, and what stands before the value."""
    raw = key.encode("utf-8", "surrogatepass")
    name = f"{OURS}{prefix}{quote(raw, safe=':@,')}".encode()
    if len(name) <= MOST_NAME:
        return name, b""
    return f"{OURS}{prefix}{_DIGEST}{hashlib.sha256(raw).hexdigest()}".encode(), raw


def key_of(prefix: str, listed: bytes) -> str | None:
    """The key of a name as the server lists it, quoted once more. None for other programs' and other prefixes', and
    where only the value tells the key."""
    name = unquote_to_bytes(listed)
    start = f"{OURS}{prefix}".encode()
    if not name.startswith(start) or b"/" in (rest := name[len(start) :]):
        return None
    if rest.startswith(_DIGEST.encode()):
        return None
    try:
        key = unquote_to_bytes(rest).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return key if fits_key(key) and name_of(prefix, key)[0] == name else None


def is_digest(prefix: str, listed: bytes) -> bool:
    """Whether the key of a listed name stands before its value."""
    name, start = unquote_to_bytes(listed), f"{OURS}{prefix}{_DIGEST}".encode()
    return name.startswith(start) and len(name) == len(start) + 64
