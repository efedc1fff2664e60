"""Known insides of pages, as data.

A layout is one line for K and one for V, from the outermost part of a page to the innermost:
``heads tokens kv channels`` is one head's tokens after another, each token's K before its V.
``tokens/16 ... tokens%16`` cuts an axis in two: groups of sixteen, and the place in the group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from kvlab.errors import ConfigError
from kvlab.paged.typed import PageMap, Plane


@dataclass(frozen=True)
class Order:
    """A layout's lines; `v` is empty where it is K's."""

    k: str
    v: str = ""

    def plane(self, kv: int, sizes: dict[str, int], item: int) -> Plane | None:
        """Where K (0) or V (1) lies; None where a group does not divide its axis."""
        pieces = [_piece(word, sizes) for word in (self.v if kv and self.v else self.k).split()]
        if any(piece is None for piece in pieces):
            return None
        tables = {axis: [0] * size for axis, size in sizes.items()}
        stride = item
        for axis, group, inner, size in reversed([piece for piece in pieces if piece is not None]):
            for at in range(sizes[axis]):
                tables[axis][at] += stride * (at % group if inner else at // group)
            stride *= size
        start = tables["kv"][kv]
        return Plane(tuple(start + at for at in tables["tokens"]), tuple(tables["heads"]), tuple(tables["channels"]))


def _piece(word: str, sizes: dict[str, int]) -> tuple[str, int, bool, int] | None:
    """(axis, group, whether it is the place in the group, its size); None where the group does not divide the axis."""
    for sign in "/%":
        axis, found, group = word.partition(sign)
        if found:
            each = int(group)
            if sizes[axis] % each:
                return None
            return axis, each, sign == "%", each if sign == "%" else sizes[axis] // each
    return word, 1, False, sizes[word]


# vLLM's names where it has one: L(ayers) B(locks) H(eads) tokeN(s) C(ontent), the content of a token's head being K and
# then V (vllm/v1/kv_cache_layout.py). NHD and HND are of versions that keep a page's K before its V. On a CPU the
# attention kernels pack: K transposed, or both in pairs for AMX's tiles (csrc/cpu/cpu_attn_*.hpp).
KNOWN = {
    "HNC": Order("heads tokens kv channels"),
    "NHC": Order("tokens heads kv channels"),
    "NHD": Order("kv tokens heads channels"),
    "HND": Order("kv heads tokens channels"),
    "heads of K, then of V": Order("tokens kv heads channels"),
    "CPU vec": Order("heads kv channels tokens", "heads kv tokens channels"),
    "CPU amx": Order(
        "heads kv tokens/16 channels/2 tokens%16 channels%2", "heads kv channels/16 tokens/2 channels%16 tokens%2"
    ),
}


def known_maps(
    *,
    block_tokens: int,
    kv_heads: int,
    head_dim: int,
    element: torch.dtype,
    page_bytes: int,
    latent: bool = False,
    rows: int = 1,
) -> Iterator[PageMap]:
    """The maps of all known layouts that pages of this size can have, each once.

    `rows`: an engine may cut a block of its tables into so many blocks of its kernels, which lie one after the other.
    """
    if block_tokens % rows or page_bytes % rows:
        return
    sizes = {"tokens": block_tokens // rows, "heads": kv_heads, "kv": 1 if latent else 2, "channels": head_dim}
    if prod(sizes.values()) * element.itemsize > page_bytes // rows:
        return
    seen = set()
    for name, order in KNOWN.items():
        planes = [order.plane(kv, sizes, element.itemsize) for kv in range(sizes["kv"])]
        whole = tuple(_repeated(plane, rows, page_bytes // rows) for plane in planes if plane is not None)
        if len(whole) == len(planes) and whole not in seen:
            seen.add(whole)
            try:
                yield PageMap("latents" if latent else name, element, page_bytes, whole)
            except ConfigError:
                continue  # two lines that do not fit each other at this size


def _repeated(plane: Plane, rows: int, row_bytes: int) -> Plane:
    """`plane` in so many rows of a page."""
    tokens = tuple(row * row_bytes + token for row in range(rows) for token in plane.tokens)
    return Plane(tokens, plane.heads, plane.channels)
