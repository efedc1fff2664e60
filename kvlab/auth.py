"""A secret key that objects are signed with: who may write to a tier is then not who may be believed.

The signature is a MAC, BLAKE3 in its keyed mode. The key comes from a file and leaves this module in no form but the
MACs and `AuthKey.id`: it stands in no repr, message or log.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from blake3 import blake3

from kvlab.errors import ConfigError

Buffer: TypeAlias = bytes | bytearray | memoryview

MIN_BYTES, MAX_BYTES = 32, 4096  # of a key file
MAC_BYTES = 32


class AuthKey:
    """One key. `id` (16 hex digits) tells keys apart and reveals nothing of them.

    >>> AuthKey(bytes(32))
    AuthKey(id='aa7d0f62b55f2f55')
    """

    __slots__ = ("_key", "id")

    def __init__(self, secret: bytes) -> None:
        if not MIN_BYTES <= len(secret) <= MAX_BYTES:
            raise ConfigError(f"an auth key must hold {MIN_BYTES} to {MAX_BYTES} random bytes, got {len(secret)}")
        # Two keys of one secret: what is published as the id has nothing to do with what signs.
        self._key: bytes = blake3(secret, derive_key_context="kvlab 2026-07 object signatures").digest()
        self.id: str = blake3(secret, derive_key_context="kvlab 2026-07 key id").hexdigest(length=8)

    @classmethod
    def from_file(cls, path: str | Path) -> "AuthKey":
        """The key in the file at `path`: its bytes as they are, 32 or more, made for instance with
        ``head -c 32 /dev/urandom > key; chmod 600 key``.

        Raises ConfigError where it cannot be read, or where others than its owner can read or write it.
        """
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                about = os.fstat(file.fileno())
                secret = file.read(MAX_BYTES + 1) if stat.S_ISREG(about.st_mode) else b""
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no path"
            how = "make one with: head -c 32 /dev/urandom > FILE; chmod 600 FILE"
            raise ConfigError(f"cannot read the auth key file {str(path)!r}: {reason}; {how}") from error
        if not stat.S_ISREG(about.st_mode):
            raise ConfigError(f"the auth key must be a plain file, {str(path)!r} is none")
        if about.st_mode & 0o077:
            mode = stat.S_IMODE(about.st_mode)
            raise ConfigError(f"the auth key file {str(path)!r} is open to others (mode {mode:03o}): chmod 600 it")
        if about.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"the auth key file {str(path)!r} belongs to user {about.st_uid}: chown it")
        return cls(secret)

    def mac(self, pieces: Iterable[Buffer]) -> str:
        """The MAC of `pieces` in a row, 64 hex digits. Releases the GIL, once a piece."""
        mac = blake3(key=self._key)
        for piece in pieces:
            mac.update(piece)
        found: str = mac.hexdigest(length=MAC_BYTES)
        return found

    def __repr__(self) -> str:
        return f"AuthKey(id={self.id!r})"

    def __reduce__(self) -> str:
        raise TypeError("an AuthKey is not pickled; let each process read its file")


def auth_key(auth: "AuthKey | str | Path | None") -> AuthKey | None:
    """`auth` itself, or the key in the file that it names."""
    return auth if auth is None or isinstance(auth, AuthKey) else AuthKey.from_file(auth)


def _without_waiting(path: str, flags: int) -> int:
    """To open a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)
