"""What an object's metadata states of the KV in it, and what a reader expects of it.

Metadata comes from a medium that others can write, so nothing in it is believed: it must say what the reader expects, a
bad field is a FormatError, and nothing is allocated for it. An object names the kind of serde that wrote it and no
options: what reading needs stands in its params, which are data, and never a path.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from kvlab.container import ITEM_BYTES, MAX_DIGITS, MAX_DIMS, parse_json
from kvlab.errors import FormatError

# What KV may be made of, by torch's names; the names of safetensors.
KV_DTYPES = {
    "uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int16": "I16", "uint16": "U16",
    "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "int64": "I64",
}  # fmt: skip
CODED_KINDS = ("int8", "int4", "fp8", "rotated4", "centered")  # serdes that give every block of pages the same size
CHUNKED_KINDS = ("cachegen", "cachegen-lmcache")  # serdes of whole chunks that must tell K from V
MAX_ELEMENTS = 1 << 40  # of a tensor, an empty axis counted as one: strides are computed for those too
MAX_NAME = 64  # characters of the name of a serde or an axis
MAX_DECODED_BYTES = 1 << 30  # of KV that a reader takes who does not say what it expects


@dataclass(frozen=True)
class Expected:
    """What a reader takes a stored tensor for; None is anything, for a size in `shape` anything but 0. `max_bytes`
    bounds what decoding may allocate, `tokens` are the first token of a prompt that it holds and the end
    (exclusive)."""

    axes: tuple[str, ...] | None = None
    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None
    max_bytes: int = MAX_DECODED_BYTES
    tokens: tuple[int, int] | None = None

    def check_tokens(self, metadata: Mapping[str, str]) -> None:
        """FormatError with the reason ``wrong_range`` unless the object holds these tokens."""
        wanted = {} if self.tokens is None else token_range(*self.tokens)
        if any(metadata.get(name) != place for name, place in wanted.items()):
            found = {name: str(metadata.get(name))[:MAX_DIGITS] for name in wanted}
            raise FormatError(f"object must hold {wanted}, it says {found}", reason="wrong_range")

    def check(self, axes: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> None:
        """FormatError with the reason ``wrong_axes``, ``wrong_shape``, ``wrong_dtype`` or ``too_large``."""
        if self.axes is not None and axes != self.axes:
            raise FormatError(f"axes must be {self.axes}, the object has {axes}"[:300], reason="wrong_axes")
        if self.dtype is not None and dtype != self.dtype:
            raise FormatError(f"dtype must be {self.dtype}, the object has {dtype}", reason="wrong_dtype")
        if self.shape is not None and (
            len(shape) != len(self.shape)
            or any((n < 1) if wanted is None else (n != wanted) for wanted, n in zip(self.shape, shape, strict=True))
        ):
            raise FormatError(f"shape must be {self.shape}, the object has {shape}", reason="wrong_shape")
        num_bytes = prod(shape) * ITEM_BYTES[KV_DTYPES[dtype]]
        if num_bytes > self.max_bytes:
            raise FormatError(f"at most {self.max_bytes} bytes are expected, it has {num_bytes}", reason="too_large")


ANYTHING = Expected()


def is_coded(serde: str) -> bool:
    """Whether this serde codes blocks of pages one by one, each to the same size."""
    return serde.partition(":")[0] in CODED_KINDS


def is_chunked(serde: str) -> bool:
    """Whether this serde codes whole chunks of pages whose inside is known, to a size that depends on their content."""
    return serde.partition(":")[0] in CHUNKED_KINDS


@dataclass(frozen=True)
class Stated:
    """A tensor of KV as its metadata states it: the kind of serde, shape, dtype and axes, and the serde's params."""

    serde: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    params: Mapping[str, Any]


def metadata_of(
    serde: str, shape: Sequence[int], dtype: str, axes: Sequence[str], params: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata that `stated` reads."""
    return {
        "serde": serde,
        "shape": json.dumps(list(shape)),
        "dtype": dtype,
        "axes": json.dumps(list(axes)),
        "params": json.dumps(dict(params), separators=(",", ":")),
    }


def token_range(first_token: int, end_token: int) -> dict[str, str]:
    """The metadata that says which tokens of a prompt an object holds; `end_token` is exclusive."""
    return {"first_token": str(first_token), "end_token": str(end_token)}


def stated(metadata: Mapping[str, str], expected: Expected = ANYTHING) -> Stated:
    """What `metadata` states. Raises FormatError for a field that is missing, of another type, out of bounds or not as
    `expected`."""
    name, dtype = (_text(metadata, key) for key in ("serde", "dtype"))
    shape, axes, params = (_field(metadata, key) for key in ("shape", "axes", "params"))
    if dtype not in KV_DTYPES:
        raise FormatError(f"metadata must name a dtype of KV, got {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"shape must be up to {MAX_DIMS} sizes, got {str(shape)[:80]!r}")
    if prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise FormatError(f"shape must have at most {MAX_ELEMENTS} elements, got {shape}")
    if not isinstance(axes, list) or len(axes) != len(shape) or not all(_is_name(axis) for axis in axes):
        raise FormatError(f"axes must name each of {len(shape)} dimensions, got {str(axes)[:80]!r}")
    if not isinstance(params, dict):
        raise FormatError(f"params must be an object, got {str(params)[:80]!r}")
    expected.check_tokens(metadata)
    expected.check(tuple(axes), tuple(shape), dtype)
    return Stated(name, tuple(shape), dtype, tuple(axes), params)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _text(metadata: Mapping[str, str], key: str) -> str:
    """The name under `key`, or FormatError."""
    value = metadata.get(key)
    if not _is_name(value) or not isinstance(value, str):
        raise FormatError(f"metadata field {key!r} must be a name of up to {MAX_NAME} characters")
    return value


def _field(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON value under `key`, or FormatError."""
    try:
        return parse_json(metadata[key])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"metadata field {key!r} is missing or broken: {error!r}"[:200]) from error
