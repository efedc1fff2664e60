"""K and V of a typed tensor, cut into the groups that share a scale. All of it is views: nothing is copied."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES

MODES = ("token", "channel")
FLOATS = {"bfloat16", "float16", "float32"}


@dataclass(frozen=True)
class Groups:
    """Equal groups of one half: `values` is the half, layers first, with the grouped axis cut in two.

    `dim` is the axis inside a group. `name` is the suffix of the half's parts: ``k`` or ``v``, and ``k.tail``
    where the last group is shorter.
    """

    name: str
    values: torch.Tensor
    dim: int


def need_kv_axes(serde: str, kv: torch.Tensor, axes: tuple[str, ...], *, latents: bool = False) -> None:
    """ConfigError with the reason unless K can be told from V in a float tensor with these axes; with `latents`, or
    unless it holds latents, which are K and V alike (MLA): kv of size 1."""
    if "kv" not in axes:
        raise ConfigError(f"{serde} must tell K from V, and axes {', '.join(axes)} do not; use lossless or naive there")
    if set(axes) == set(AXES) and len(axes) == kv.ndim and kv.shape[axes.index("kv")] == 1 and not latents:
        raise ConfigError(
            f"{serde} codes K and V apart, and latents (MLA) are neither; use int8, int4, fp8, rotated4 or lossless"
        )
    if set(axes) != set(AXES) or len(axes) != kv.ndim or kv.shape[axes.index("kv")] not in (1, 2):
        raise ConfigError(f"{serde} takes axes {', '.join(AXES)} in any order (kv of size 2), got {', '.join(axes)}")
    if str(kv.dtype).removeprefix("torch.") not in FLOATS:
        raise ConfigError(f"{serde} takes {', '.join(sorted(FLOATS))}; got {kv.dtype}, which lossless keeps as it is")


def checked_axes(shape: tuple[int, ...], axes: tuple[str, ...], dtype: str, *, latents: bool = False) -> None:
    """FormatError unless a stored chunk's shape, axes and dtype are ones that `need_kv_axes` lets in."""
    sizes = (1, 2) if latents else (2,)
    known = len(shape) == len(axes) and sorted(axes) == sorted(AXES)
    if not known or shape[axes.index("kv")] not in sizes or dtype not in FLOATS:
        raise FormatError(f"a chunk with K and V cannot be {dtype}{list(shape)} with axes {', '.join(axes)}"[:300])


def halves(kv: torch.Tensor, axes: tuple[str, ...], modes: tuple[str, str], size: int) -> Iterator[Groups]:
    """The groups of K, then of V: `size` elements each, 0 for the whole axis; layers first, other axes in order.
    Latents are cut and named as K is.

    Mode token groups along head_dim, channel along tokens. Where `size` does not divide that axis, its end is one
    shorter group of its own, the tail.
    """
    left = [axis for axis in axes if axis not in ("kv", "layers")]
    order = [axes.index(axis) for axis in ("kv", "layers", *left)]
    for letter, values, mode in zip("kv", kv.permute(order), modes, strict=False):
        axis = 1 + left.index("tokens" if mode == "channel" else "head_dim")
        length = values.shape[axis]
        whole = length - length % min(size or length, length) if length else 0
        for suffix, start, stop in (("", 0, whole), (".tail", whole, length)):
            if stop > start:
                each = min(size or length, stop - start)
                yield Groups(
                    letter + suffix, values.narrow(axis, start, stop - start).unflatten(axis, (-1, each)), axis + 1
                )
