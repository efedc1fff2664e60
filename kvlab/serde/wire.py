"""Encoded KV <-> the parts and metadata of a container, without copying a byte.

The engine packs with ``pack(key, *to_parts(encoded))`` and opens with ``from_parts(c.parts, c.metadata)``. A part
is any torch dtype the container names; its bytes are viewed, never converted. Metadata comes from a medium that
others can write, so nothing in it is believed: it must say what the reader expects, a bad field is a FormatError,
and nothing is allocated for it. An object names the kind of serde that wrote it and no options: what reading
needs stands in its params, which are data, and never a path.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from kvlab.container import MAX_DIGITS, MAX_DIMS, Part, parse_json
from kvlab.errors import ConfigError, FormatError
from kvlab.serde.base import Encoded

# safetensors' names of torch's dtypes.
DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What KV may be made of; a name from a medium is looked up here and never handed to getattr.
KV_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
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
        num_bytes = prod(shape) * KV_DTYPES[dtype].itemsize
        if num_bytes > self.max_bytes:
            raise FormatError(f"at most {self.max_bytes} bytes are expected, it has {num_bytes}", reason="too_large")


ANYTHING = Expected()


def token_range(first_token: int, end_token: int) -> dict[str, str]:
    """The metadata that says which tokens of a prompt an object holds; `end_token` is exclusive."""
    return {"first_token": str(first_token), "end_token": str(end_token)}


class _Writable:
    """A read-only buffer in the form numpy takes as writable, since torch knows no read-only tensors.

    Decoders only read parts; without this every read-only buffer would raise a warning in torch.
    """

    def __init__(self, buffer: memoryview) -> None:
        array = np.frombuffer(buffer, np.uint8)
        self.keep = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def to_parts(encoded: Encoded) -> tuple[dict[str, Part], dict[str, str]]:
    """Parts and metadata of `encoded` for `kvlab.container.pack`.

    Parts with wide items come first, so that each starts aligned behind the container's 4,096-byte header. They
    view the encoded tensors' memory and are valid until that memory is written to.
    """
    parts: dict[str, Part] = {}
    for name, tensor in sorted(encoded.parts.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in NAMES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            found = f"{tensor.dtype} on {tensor.device}"
            raise ConfigError(f"part {name!r} must be a contiguous CPU tensor of a container dtype, got {found}")
        flat = tensor.detach().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        parts[name] = Part(NAMES[tensor.dtype], tuple(tensor.shape), data)
    metadata = {
        "serde": encoded.serde,
        "shape": json.dumps(list(encoded.shape)),
        "dtype": encoded.dtype,
        "axes": json.dumps(list(encoded.axes)),
        "params": json.dumps(dict(encoded.params), separators=(",", ":")),
    }
    return parts, metadata


def from_parts(parts: Mapping[str, Part], metadata: Mapping[str, str], expected: Expected = ANYTHING) -> Encoded:
    """The Encoded that `to_parts` took apart; its tensors view the parts' bytes.

    Raises FormatError for a field that is missing, of another type, out of bounds or not as `expected`.
    """
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
    tensors = {part_name: tensor_of(part) for part_name, part in parts.items()}
    return Encoded(name, tuple(shape), dtype, tuple(axes), tensors, params)


def tensor_of(part: Part) -> torch.Tensor:
    """`part` as a tensor that views its bytes (copied only where they lie unaligned for the dtype)."""
    dtype = DTYPES.get(part.dtype)
    if dtype is None or part.data.nbytes != part.nbytes:
        raise FormatError(f"a {part.dtype} part of shape {list(part.shape)} cannot hold {part.data.nbytes} bytes")
    if part.nbytes == 0:
        return torch.empty(part.shape, dtype=dtype)
    flat = torch.from_numpy(np.asarray(_Writable(part.data)))
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).reshape(part.shape)


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
