"""Which prefix is this? Keys that agree across processes, machines and years.

One SHA-256 chain runs over the engine's blocks::

    h[-1] = H(format name)
    h[i]  = H(h[i-1] || block tokens as little-endian u32 || tagged extras of block i)

so a hash stands for *all* tokens up to and including its block. Never Python's `hash`, no seed from the
environment. A store key is a namespace and a hash; the namespace holds everything besides the tokens that makes
KV differ (see `Namespace`), and stays out of the chain so that a miss can tell "other namespace" from "never seen".
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kvlab.errors import ConfigError

FORMAT = "kvlab/1"  # a change of the chain or of the canonical form below needs a new number
HASH_BYTES = 16  # of SHA-256's 32: a collision among 2**40 objects has a chance of about 2**-49
MAX_NAMESPACE_BYTES = 12 << 10  # as a string in a header, of whose 16 KiB the parts and the key need a quarter
_sha256 = hashlib.sha256
ROOT = _sha256(FORMAT.encode()).digest()[:HASH_BYTES]

Extra = tuple[str, str]  # (tag, value); the tag keeps a LoRA "x" and a salt "x" apart


@dataclass(frozen=True)
class Namespace:
    """Everything but the tokens that makes KV differ: model, dtype, layout, block size, rank, serde...

    `model` is a label for people; `fields` are what is hashed (`model` included). Two namespaces are the same
    if and only if all fields are. ConfigError where they take more than `MAX_NAMESPACE_BYTES`, as every object carries
    them in its header.
    """

    model: str
    fields: Mapping[str, str | int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if reserved := {"format", "model"} & set(self.fields):
            raise ConfigError(
                f"a namespace has no field {sorted(reserved)[0]!r}: that name is kvlab's own; take another"
            )
        try:
            for text in (self.model, *self.fields, *self.fields.values()):
                str(text).encode()
        except UnicodeEncodeError:  # in JSON, a pair of lone surrogates reads as another character
            raise ConfigError("a namespace must be text without lone surrogates") from None
        if (size := len(json.dumps(self.canonical))) > MAX_NAMESPACE_BYTES:
            raise ConfigError(
                f"a namespace must fit {MAX_NAMESPACE_BYTES} bytes, this one takes {size}; shorten a field"
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: SHA-256 of the fields as canonical JSON."""
        return _sha256(self.canonical.encode()).digest()

    @cached_property
    def canonical(self) -> str:
        """The fields as JSON with sorted keys; kept beside stored data so that a miss can name what differs."""
        return json.dumps({"format": FORMAT, "model": self.model, **self.fields}, sort_keys=True, separators=(",", ":"))

    @cached_property
    def id(self) -> str:
        """16 hex characters, used in keys."""
        return self.digest.hex()[:16]

    def key(self, block_hash: bytes) -> str:
        """The store key of the object that ends at the block with this hash: ``kvlab:<model>:<namespace>:<hash>``."""
        return f"{self._prefix}{block_hash.hex()}"

    @cached_property
    def _prefix(self) -> str:
        label = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.model)[:64]
        return f"kvlab:{label}:{self.id}:"

    def extended(self, **fields: str | int | None) -> "Namespace":
        """This namespace with more fields. ConfigError where one is there already with another value."""
        for name, value in fields.items():
            if self.fields.get(name, value) != value:
                raise ConfigError(f"namespace field {name!r} must be {value!r}, got {self.fields[name]!r}")
        return Namespace(self.model, {**self.fields, **fields})

    def differing(self, theirs: Mapping[str, object]) -> list[str]:
        """Names of the fields in which this namespace and another's canonical form, parsed, differ."""
        mine = json.loads(self.canonical)
        return sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))


def versioned(namespace: Namespace, version: str) -> Namespace:
    """`namespace` for another state of what it names, such as weights that changed while an engine ran; the same for
    an empty `version`."""
    return Namespace(namespace.model, {**namespace.fields, "version": version}) if version else namespace


def cache_namespace(
    namespace: Namespace, *, chunk_tokens: int, block_tokens: int, auth: str | None = None
) -> Namespace:
    """`namespace` with what a cache adds to it: the sizes that decide where an object begins, since a hash names only
    where it ends, and the id of the key that signs objects. The one place that does, for those who store and those who
    look up."""
    signed = {} if auth is None else {"auth": auth}
    return namespace.extended(chunk_tokens=chunk_tokens, block_tokens=block_tokens, **signed)


def _encode_extras(extras: Iterable[Extra]) -> bytes:
    """Length-prefixed tag and value, so that no two lists of extras share an encoding."""
    out = bytearray()
    for tag, value in extras:
        for text in (tag, value):
            raw = text.encode("utf-8", "surrogatepass")  # a salt may be any string
            out += len(raw).to_bytes(4, "little") + raw
    return bytes(out)


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """`token_ids` as little-endian u32, the form that is hashed."""
    if isinstance(token_ids, bytes | bytearray | str):  # which an array takes for items of four bytes
        raise ConfigError(f"token ids must be a list of integers, got {type(token_ids).__name__}")
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise ConfigError(f"token ids must be integers in [0, 2**32), got {error}") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def block_hashes(
    token_ids: Sequence[int],
    block_tokens: int,
    *,
    parent: bytes | None = None,
    extras: Mapping[int, Sequence[Extra]] | None = None,
) -> list[bytes]:
    """The hash of every full block of `token_ids`, 16 bytes each.

    Parameters
    ----------
    parent
        hash of the block before the first one, to go on with a chain; None starts it.
    extras
        block index (counted from the first block given here) -> (tag, value) pairs that change this block's
        KV, such as ("lora", ...), ("cache_salt", ...) or ("mm", ...). Extras of a block also bind all later ones.
    """
    for index in extras or ():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:  # it would bind no block
            raise ConfigError(f"extras must be given by block index, an integer from 0 on, got {index!r}")
    previous = parent if parent is not None else ROOT
    raw = token_bytes(token_ids)
    step = block_tokens * 4
    hashes: list[bytes] = []
    append = hashes.append
    if not extras:  # the common case, worth its own loop: 16k tokens are 1,024 blocks
        for at in range(0, len(raw) - step + 1, step):
            previous = _sha256(previous + raw[at : at + step]).digest()[:HASH_BYTES]
            append(previous)
        return hashes
    for index, at in enumerate(range(0, len(raw) - step + 1, step)):
        message = previous + raw[at : at + step] + _encode_extras(extras.get(index, ()))
        previous = _sha256(message).digest()[:HASH_BYTES]
        append(previous)
    return hashes
