"""Which byte of a page is which: the typed view of an engine's pages.

A map is data. It says at which byte of a page the element (token, kv head, K or V, channel) begins, and it is made of
one table an axis whose entries add up: ``tokens[t] + heads[h] + channels[c]``, apart for K and for V. All layouts that
are known fit this, those that CPU kernels pack for matrix instructions among them, and a GPU program reads a few short
tables instead of one entry for every element. A page that does not fit is opaque. Nothing is believed of a map
until the engine's own write operator has shown it (`kvlab.paged.probe`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from kvlab.errors import ConfigError
from kvlab.paged.layout import PageLayout, check_block_ids

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by the bytes of an element
Table = tuple[int, ...]


@dataclass(frozen=True)
class Plane:
    """Where the elements of one plane (K, V, or a latent) lie: byte offsets in the page, one table an axis."""

    tokens: Table
    heads: Table
    channels: Table

    def offsets(self) -> torch.Tensor:
        """Byte offsets, int64 (tokens, kv_heads, head_dim)."""
        tokens, heads, channels = (torch.tensor(table) for table in (self.tokens, self.heads, self.channels))
        return tokens[:, None, None] + heads[:, None] + channels


@dataclass(frozen=True)
class PageMap:
    """Every element of a page, for the layers of one KV cache group.

    Parameters
    ----------
    name
        of the layout, for logs and errors
    element
        dtype of an element as it lies in the page
    page_bytes
        bytes of one layer's page
    planes
        (K, V), or (latent,) where a model keeps one vector for both (MLA)

    Raises
    ------
    ConfigError
        where planes differ in size, or an element lies outside of the page, at no multiple of its size, or over
        another one
    """

    name: str
    element: torch.dtype
    page_bytes: int
    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        shapes = {tuple(map(len, (plane.tokens, plane.heads, plane.channels))) for plane in self.planes}
        if len(self.planes) not in (1, 2) or len(shapes) != 1:
            raise ConfigError(f"a page map needs K and V of one shape, or one latent; got {sorted(shapes)}")
        item = self.element.itemsize
        if item not in WORDS or self.page_bytes % item:
            raise ConfigError(f"pages of {self.page_bytes} bytes cannot hold elements of {self.element}")
        taken = self.offsets.flatten()
        if taken.numel() and (int(taken.min()) < 0 or int(taken.max()) > self.page_bytes - item):
            raise ConfigError(f"map {self.name} has elements outside of its page of {self.page_bytes} bytes")
        if bool((taken % item).any()):
            raise ConfigError(f"map {self.name} has elements at no multiple of their {item} bytes")
        if not bool(taken.sort().values.diff().all()):
            raise ConfigError(f"map {self.name} has two elements at one place")

    @staticmethod
    def of(told: object) -> "PageMap":
        """The map that `as_json` told of, which others may have written. ConfigError where it is none."""
        try:
            fields = dict(told)  # type: ignore[call-overload]
            element = getattr(torch, str(fields["element"]), None)
            tables = [[tuple(map(int, table)) for table in plane] for plane in fields["planes"]]
            page_bytes = int(fields["page_bytes"])
            # Before anything as large as they say is made.
            too_large = any(prod(map(len, plane)) > page_bytes for plane in tables)
            if not isinstance(element, torch.dtype) or too_large:
                raise ValueError("no such page")
            planes = tuple(Plane(*plane) for plane in tables)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ConfigError(f"a page map must name an element, the bytes of a page and planes: {error}") from None
        return PageMap(str(fields.get("name", "")), element, page_bytes, planes)

    def as_json(self) -> dict[str, Any]:
        """What `of` reads."""
        return {
            "name": self.name,
            "element": str(self.element).removeprefix("torch."),
            "page_bytes": self.page_bytes,
            "planes": [[plane.tokens, plane.heads, plane.channels] for plane in self.planes],
        }

    def __repr__(self) -> str:
        what = "K and V" if len(self.planes) == 2 else "latents"
        about = f"{self.block_tokens} tokens, {self.kv_heads} heads of {self.head_dim} {str(self.element)[6:]}"
        return f"PageMap({self.name}: {what}, {about}, {self.page_bytes:,} bytes)"

    @property
    def block_tokens(self) -> int:
        return len(self.planes[0].tokens)

    @property
    def kv_heads(self) -> int:
        return len(self.planes[0].heads)

    @property
    def head_dim(self) -> int:
        return len(self.planes[0].channels)

    @property
    def is_latent(self) -> bool:
        """Whether a token has one vector that is K and V alike."""
        return len(self.planes) == 1

    @cached_property
    def offsets(self) -> torch.Tensor:
        """The byte at which each element begins, int64 (tokens, kv_heads, kv, head_dim)."""
        return torch.stack([plane.offsets() for plane in self.planes], dim=2)

    @cached_property
    def is_full(self) -> bool:
        """Whether every byte of the page is an element's."""
        return self.offsets.numel() * self.element.itemsize == self.page_bytes

    def shape(self, num_layers: int, num_tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of typed KV with kvlab.geometry's axes: layers, tokens, kv_heads, kv, head_dim."""
        return (num_layers, num_tokens, self.kv_heads, len(self.planes), self.head_dim)

    def read(self, pages: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The first `num_tokens` tokens of pages, uint8 (blocks, layers, page_bytes), as typed KV; on their device."""
        self._check(pages, num_tokens)
        words = pages.contiguous().view(WORDS[self.element.itemsize])
        typed = words[:, :, self._places(pages.device)]  # blocks, layers, tokens, kv_heads, kv, head_dim
        return typed.transpose(0, 1).flatten(1, 2)[:, :num_tokens].contiguous().view(self.element)

    def write(self, kv: torch.Tensor, pages: torch.Tensor) -> None:
        """Write typed KV into pages, contiguous uint8 (blocks, layers, page_bytes); all other bytes stay."""
        num_tokens = kv.shape[1]
        self._check(pages, num_tokens)
        if tuple(kv.shape) != self.shape(pages.shape[1], num_tokens) or kv.dtype != self.element:
            want = f"{self.element}{list(self.shape(pages.shape[1], num_tokens))}"
            raise ConfigError(f"typed KV must be {want}, got {kv.dtype}{list(kv.shape)}")
        words = pages.view(WORDS[self.element.itemsize])
        values = kv.contiguous().view(words.dtype).to(pages.device)
        places = self._places(pages.device)
        for block in range(-(-num_tokens // self.block_tokens)):
            piece = values[:, block * self.block_tokens : (block + 1) * self.block_tokens]
            words[block][:, places[: piece.shape[1]]] = piece

    def _places(self, device: torch.device) -> torch.Tensor:
        return (self.offsets // self.element.itemsize).to(device)

    def _check(self, pages: torch.Tensor, num_tokens: int) -> None:
        if pages.dim() != 3 or pages.shape[2] != self.page_bytes or pages.dtype != torch.uint8:
            raise ConfigError(
                f"pages must be uint8 [blocks, layers, {self.page_bytes}], got {pages.dtype}{list(pages.shape)}"
            )
        if not 0 <= num_tokens <= pages.shape[0] * self.block_tokens:
            raise ConfigError(f"{pages.shape[0]} blocks hold up to {pages.shape[0] * self.block_tokens} tokens, "
                              f"got {num_tokens}")  # fmt: skip


@dataclass(frozen=True)
class Opaque:
    """Pages whose inside is not known, and why: their bytes are moved as they are."""

    reason: str


@dataclass(frozen=True)
class TypedPages:
    """An engine's pages with the map of their inside: typed KV of blocks, read and written in plain torch.

    `num_layers` are those of the KV cache group, the first of the layout (groups may lie over each other).
    """

    layout: PageLayout
    map: PageMap
    num_layers: int

    def __post_init__(self) -> None:
        if self.map.page_bytes != self.layout.page_bytes or not 1 <= self.num_layers <= self.layout.num_layers:
            raise ConfigError(f"{self.map} of {self.num_layers} layers does not fit {self.layout}")

    def read(self, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        """Typed KV of the first `num_tokens` tokens of `block_ids`: layers, tokens, kv_heads, kv, head_dim."""
        return self.map.read(self._gathered(block_ids), num_tokens)

    def write(self, kv: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Write typed KV into the pages of `block_ids`; bytes that are no element of its tokens stay as they are."""
        pages = self._gathered(block_ids)
        self.map.write(kv, pages)
        index = torch.as_tensor(block_ids, dtype=torch.int64, device=pages.device)
        for layer in range(self.num_layers):
            self.layout.pages[layer][index] = pages[:, layer]

    def _gathered(self, block_ids: Sequence[int]) -> torch.Tensor:
        check_block_ids(block_ids, self.layout.num_blocks)
        layers = self.layout.pages[: self.num_layers]
        index = torch.as_tensor(block_ids, dtype=torch.int64, device=layers[0].device)
        return torch.stack([pages[index] for pages in layers], dim=1)
