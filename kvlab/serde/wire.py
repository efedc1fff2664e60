"""Encoded KV <-> the parts and metadata of a container, without copying a byte.

The engine packs with ``pack(key, *to_parts(encoded))`` and opens with ``from_parts(c.parts, c.metadata)``. A part
is any torch dtype the container names; its bytes are viewed, never converted.
"""

from collections.abc import Mapping

import numpy as np
import torch

from kvlab.container import Part
from kvlab.errors import ConfigError, FormatError
from kvlab.serde.base import Encoded
from kvlab.stated import ANYTHING, KV_DTYPES, Expected, metadata_of, stated

# safetensors' names of torch's dtypes.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for dtype, name in KV_DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    return parts, metadata_of(encoded.serde, encoded.shape, encoded.dtype, encoded.axes, encoded.params)


def from_parts(parts: Mapping[str, Part], metadata: Mapping[str, str], expected: Expected = ANYTHING) -> Encoded:
    """The Encoded that `to_parts` took apart; its tensors view the parts' bytes.

    Raises FormatError for a field that is missing, of another type, out of bounds or not as `expected`.
    """
    said = stated(metadata, expected)
    tensors = {part_name: tensor_of(part) for part_name, part in parts.items()}
    return Encoded(said.serde, said.shape, said.dtype, said.axes, tensors, said.params)


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
