"""What a store's keys are called in a bucket: readable by people, safe in a URL, and reversible.

A name has no ``/``, which servers with a file system below make a folder of, and at most 255 bytes, which is all that
those allow. A key that is longer lies under its digest, and its object's metadata tell it.
"""

import base64
import binascii
import hashlib
import re
from urllib.parse import quote, unquote_to_bytes

from kvlab.stores.base import fits_key

SUFFIX = ".safetensors"
NAME_CHARS = 240
DIGEST = "="  # before a digest; no name of a key begins with it
_DIGEST_NAME = re.compile(rf"{DIGEST}[0-9a-f]{{64}}{re.escape(SUFFIX)}")
KEY_HEADER = "x-amz-meta-kvlab-key"  # of a name that is a digest


def name_of(key: str) -> str:
    """What `key` is called under the prefix.

    >>> name_of("kvlab:m:0:../x"), name_of("k" * 300)[:12]
    ('kvlab:m:0:..%2Fx.safetensors', '=95c53d92ccf')
    """
    raw = key.encode("utf-8", "surrogatepass")
    name = quote(raw, safe=":@,") + SUFFIX
    return name if len(name) <= NAME_CHARS else f"{DIGEST}{hashlib.sha256(raw).hexdigest()}{SUFFIX}"


def metadata_of(key: str, name: str) -> dict[str, str]:
    """The headers that tell `key` where `name` does not."""
    if not name.startswith(DIGEST):
        return {}
    return {KEY_HEADER: base64.urlsafe_b64encode(key.encode("utf-8", "surrogatepass")).decode()}


def key_of(name: str, told: str = "") -> str | None:
    """The key that is stored as `name`, which is `told` where the name is a digest; None where another program has made
    a name that no key has."""
    try:
        if name.startswith(DIGEST):
            raw = base64.b64decode(told.encode("ascii"), altchars=b"-_", validate=True)
        else:
            raw = unquote_to_bytes(name.removesuffix(SUFFIX))
        key = raw.decode("utf-8", "surrogatepass")
    except (ValueError, binascii.Error):
        return None
    return key if fits_key(key) and name_of(key) == name else None


def is_digest(name: str) -> bool:
    """Whether `name` is a digest's, so that the metadata tell which key it is."""
    return _DIGEST_NAME.fullmatch(name) is not None
