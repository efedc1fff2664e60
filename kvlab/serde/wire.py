"""Encoded KV <-> the parts and metadata of a container, without copying a byte.

The engine packs with ``pack(key, *to_parts(encoded))`` and opens with ``from_parts(c.parts, c.metadata)``. A part
is any torch dtype the container names; its bytes are viewed, never converted. Metadata comes from a medium that
others can write, so nothing in it is believed: a bad field is a FormatError, and nothing is allocated for it.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from kvlab.container import Part
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
MAX_DIMS = 8
MAX_ELEMENTS = 1 << 40


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
    view the encoded tensors' memory and are valid as long as nobody writes it.
    """
    parts: dict[str, Part] = {}
    for name, tensor in sorted(encoded.parts.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in NAMES or tensor.device.type != "cpu" or not tensor.is_contiguous():
            found = f"{tensor.dtype} on {tensor.device}"
            raise ConfigError(f"part {name!r} must be a contiguous CPU tensor of a container dtype, got {found}")
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        parts[name] = Part(NAMES[tensor.dtype], tuple(tensor.shape), data)
    metadata = {
        "serde": encoded.serde,
        "shape": json.dumps(list(encoded.shape)),
        "dtype": encoded.dtype,
        "axes": json.dumps(list(encoded.axes)),
        "params": json.dumps(dict(encoded.params), separators=(",", ":")),
    }
    return parts, metadata


def from_parts(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> Encoded:
    """The Encoded that `to_parts` took apart; its tensors view the parts' bytes.

    Raises FormatError for a field that is missing, of another type or out of bounds.
    """
    spec, shape, axes, params = metadata.get("serde"), *(_field(metadata, key) for key in ("shape", "axes", "params"))
    dtype = metadata.get("dtype")
    if not isinstance(spec, str) or dtype not in KV_DTYPES:
        raise FormatError(f"metadata must name a serde and a dtype, got {str(spec)[:60]!r} and {str(dtype)[:60]!r}")
    sizes = shape if isinstance(shape, list) and len(shape) <= MAX_DIMS else [-1]
    if not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in sizes) or prod(sizes) > MAX_ELEMENTS:
        raise FormatError(f"shape must be up to {MAX_DIMS} sizes, got {str(shape)[:80]}")
    if not isinstance(axes, list) or len(axes) != len(shape) or not all(isinstance(axis, str) for axis in axes):
        raise FormatError(f"axes must name each of {len(shape)} dimensions, got {str(axes)[:80]}")
    if not isinstance(params, dict):
        raise FormatError(f"params must be an object, got {str(params)[:80]}")
    tensors = {name: tensor_of(part) for name, part in parts.items()}
    return Encoded(spec, tuple(shape), dtype, tuple(axes), tensors, params)


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


def _field(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON value under `key`, or FormatError."""
    try:
        return json.loads(metadata[key])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"metadata field {key!r} is missing or broken: {error!r}"[:200]) from error
