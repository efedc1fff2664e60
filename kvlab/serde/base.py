"""What a serde is: KV tensor to named parts and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kvlab.errors import FormatError

# Parts whose names start so are counted under that heading by `Encoded.bits`.
PART_KINDS = ("payload", "scales", "tables", "anchors")


@dataclass(frozen=True)
class Encoded:
    """A chunk's KV after encoding.

    `parts` are contiguous CPU tensors by name (a name starts with payload, scales, tables or anchors); `shape`,
    `dtype` (torch's name without ``torch.``) and `axes` describe the tensor that went in; `params` are whatever
    the serde needs to decode, as JSON-able values; `serde` is the name of its kind. Sizes are all-in: nothing needed
    for decoding lies elsewhere, except a table named by digest, which belongs to the model and not to the chunk.
    """

    serde: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    parts: Mapping[str, torch.Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name} {str(part.dtype).removeprefix('torch.')}{list(part.shape)}" for name, part in self.parts.items()
        )
        about = f"{self.serde!r}, {self.dtype}{list(self.shape)} as {', '.join(self.axes)}"
        return f"Encoded({about}; {sum(self.bits().values()) // 8:,} bytes: {parts[:1000]})"

    def bits(self) -> dict[str, int]:
        """Bits by kind of part: payload, scales, tables, anchors. The header is the container's."""
        counted = dict.fromkeys(PART_KINDS, 0)
        for name, part in self.parts.items():
            kind = next((kind for kind in PART_KINDS if name.startswith(kind)), "payload")
            counted[kind] += 8 * part.numel() * part.element_size()
        return counted


class Serde(ABC):
    """KV tensor to bytes and back. Authors write `encode` and `decode`; kvlab.testing.SerdeTests judges the rest.

    Input is a contiguous or strided CPU or CUDA tensor with one axis name per dimension: typed KV with the axes of
    kvlab.geometry, or an engine's pages as ``uint8`` with axes (blocks, layers, page_bytes), whose inside is
    opaque. Two serdes share a `name` only if each decodes all the other ever wrote, whatever its options: an object
    names no more than that, and is decoded by an instance made without options. What decoding depends on stands in
    `Encoded.params`; it comes from a medium that others can write, so `decode` checks it like the parts.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    # True where K must be told from V (axis "kv"); such a serde refuses opaque pages at start, not at the first save.
    needs_kv_axes: ClassVar[bool] = False
    # True where such a serde also codes latents (MLA): one vector a token, K and V alike, an axis "kv" of size 1.
    takes_latents: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """The string that makes this serde again with `get_serde`."""
        return self.name

    def prepare(self) -> None:  # noqa: B027  # most have nothing to prepare
        """Compile what it needs, before the first object is waited for."""

    @abstractmethod
    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        """Encode `kv`. The result never shares memory that the caller may overwrite, unless the caller
        promises not to (the engine packs and writes before it returns the buffer)."""

    @abstractmethod
    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        """The KV tensor, written into `out` (same shape and dtype, contiguous) if given.

        Raises FormatError, and nothing else, on parts and params that do not fit each other; allocates no more than
        a small multiple of what the stated shape needs, which `Expected` has bounded.
        """

    def ratio(self) -> float | None:
        """Encoded bytes per raw byte where that is fixed by the format, else None (it depends on the data)."""
        return None

    def __repr__(self) -> str:
        return f"get_serde({self.spec!r})"


def checked_out(encoded: Encoded, out: torch.Tensor | None) -> torch.Tensor:
    """`out` if it fits `encoded`, else a new tensor; FormatError where it does not fit."""
    dtype = torch_dtype(encoded)
    if out is None:
        return torch.empty(encoded.shape, dtype=dtype)
    if tuple(out.shape) != encoded.shape or out.dtype != dtype or not out.is_contiguous():
        raise FormatError(
            f"out must be contiguous {encoded.dtype}{list(encoded.shape)}, got {out.dtype}{list(out.shape)}",
            reason="wrong_shape",
        )
    return out


def torch_dtype(encoded: Encoded) -> torch.dtype:
    """The dtype of the KV, or FormatError where torch has none of this name."""
    dtype = getattr(torch, encoded.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"unknown dtype {encoded.dtype!r} in encoded KV")
    return dtype
