"""Page maps proven by the engine's own write operator.

The operator writes elements that can be told apart into scratch pages, and the map must read every one of them back,
bit for bit; bytes that the map gives to no element must stay as they were, and so must the pages beside. An element has
few values (an fp8 one 256), a page many elements: they are written in rounds, each a digit of the element's number,
so that any two elements differ in some round. Every bit of an element takes both values.

`understand` tries the known layouts, and where none is proven it reads off where each element went. What cannot be
proven is `Opaque`, with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kvlab.paged.known import known_maps
from kvlab.paged.typed import WORDS, Opaque, PageMap, Plane, Table

BLOCKS = 3  # scratch pages: the one that is probed lies between two that must stay as they are
PROBED = 1
UNTOUCHED = 0xA5  # every byte of a scratch page before a probe
VALUES = 128  # elements' values of one round, at most
NUDGE = 1 + 2.0**-6  # of what becomes fp8: an operator may cut off where others round, and both must get it right
NEAR = (2.0**-5, 2.0**5)  # sizes of those values
ELEMENTS = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


class _Astray(Exception):
    """The operator wrote to a page that no slot names."""


@dataclass(frozen=True)
class Scratch:
    """A few pages like the engine's, and its operator over them.

    Parameters
    ----------
    pages
        uint8 (BLOCKS, page_bytes) over the operator's memory
    write
        ``write(planes, slots)`` runs the operator. `planes` are K and V, or the latents: (tokens, kv_heads, head_dim)
        of dtype `given`; `slots` are int64 (tokens): block * block_tokens + the token's place in its block
    block_tokens, kv_heads, head_dim
        of a page
    element
        dtype of an element as it lies in the page
    given
        dtype of what the operator takes, the model's
    latent
        whether a token has one vector that is K and V alike
    scales
        by which the operator divides each plane, where it makes fp8 of it
    rows
        blocks of the engine's kernels in a block of its tables
    """

    pages: torch.Tensor
    write: Callable[[Sequence[torch.Tensor], torch.Tensor], None]
    block_tokens: int
    kv_heads: int
    head_dim: int
    element: torch.dtype
    given: torch.dtype
    latent: bool = False
    scales: tuple[float, ...] = (1.0, 1.0)
    rows: int = 1

    @property
    def num_planes(self) -> int:
        return 1 if self.latent else 2

    @property
    def num_elements(self) -> int:
        """Elements of a page."""
        return self.block_tokens * self.kv_heads * self.num_planes * self.head_dim


def understand(scratch: Scratch) -> PageMap | Opaque:
    """The proven map of pages like `scratch`'s, or why there is none."""
    if scratch.element not in ELEMENTS:
        return Opaque(f"elements of {scratch.element} are no plain numbers: a page may hold scales of its own")
    try:
        for found in known_maps(
            block_tokens=scratch.block_tokens,
            kv_heads=scratch.kv_heads,
            head_dim=scratch.head_dim,
            element=scratch.element,
            page_bytes=scratch.pages.shape[1],
            latent=scratch.latent,
            rows=scratch.rows,
        ):
            if flaw(found, scratch, rounds=1) is None and flaw(found, scratch) is None:
                return found
        discovered = discover(scratch)
        if isinstance(discovered, Opaque):
            return discovered
        reason = flaw(discovered, scratch, seed=1)
    except _Astray as error:
        return Opaque(str(error))
    except Exception as error:  # an operator that does not run here proves nothing
        told = " ".join(str(error).split())[:200]
        return Opaque(f"the engine's write operator does not run on scratch pages: {type(error).__name__}: {told}")
    return discovered if reason is None else Opaque(reason)


def flaw(page_map: PageMap, scratch: Scratch, *, seed: int = 0, rounds: int | None = None) -> str | None:
    """What is wrong with `page_map`, as the operator shows it; None where nothing is.

    `rounds`: only so many, to sort out maps that are far off.
    """
    planes = 1 if scratch.latent else 2
    want = (scratch.block_tokens, scratch.kv_heads, planes, scratch.head_dim)
    if tuple(page_map.offsets.shape) != want or page_map.element != scratch.element:
        return f"{page_map} is not of {list(want)} elements of {scratch.element}"
    if page_map.page_bytes != scratch.pages.shape[1]:
        return f"{page_map} is not of pages of {scratch.pages.shape[1]} bytes"
    word = WORDS[scratch.element.itemsize]
    for number in range(_rounds(scratch) if rounds is None else rounds):
        values = _values(scratch, number, seed)
        page = _written(scratch, values)
        back = page_map.read(page[None, None], scratch.block_tokens)[0].view(word)
        wrong = torch.nonzero(back != values.view(word))
        if len(wrong):
            token, head, kv, channel = wrong[0].tolist()
            letter = "latent" if scratch.latent else "KV"[kv]
            where = f"token {token}, head {head}, {letter}, channel {channel}"
            return f"map {page_map.name} reads {len(wrong)} of {values.numel()} elements wrongly, first {where}"
        free = torch.ones(page.shape[0], dtype=torch.bool)
        for byte in range(scratch.element.itemsize):
            free[page_map.offsets.flatten() + byte] = False
        if bool((page[free] != UNTOUCHED).any()):
            return f"the engine writes bytes of a page that are no element of map {page_map.name}"
    return None


def discover(scratch: Scratch) -> PageMap | Opaque:
    """The map as the operator's writes show it; not proven yet."""
    item = scratch.element.itemsize
    word = WORDS[item]
    size = scratch.pages.shape[1]
    if size % item:
        return Opaque(f"a page of {size} bytes holds no whole number of elements of {item}")
    found = torch.zeros(size // item, dtype=torch.int64)  # of each word of the page, the number of its element
    known = torch.ones(size // item, dtype=torch.bool)
    base = len(alphabet(scratch.element))
    for number in range(_rounds(scratch)):
        symbols = alphabet(scratch.element).view(word)
        order = torch.argsort(symbols.int())
        page = _written(scratch, _values(scratch, number, seed=0)).view(word)
        at = torch.searchsorted(symbols[order].int(), page.int()).clamp_(max=base - 1)
        known &= symbols[order][at] == page
        found += order[at] * base**number
    places = torch.nonzero(known & (found < scratch.num_elements)).flatten()
    numbers = found[places]
    if len(numbers) != scratch.num_elements or not bool(numbers.sort().values.diff().all()):
        num_found = int(torch.bincount(numbers).count_nonzero())
        return Opaque(f"{num_found} of {scratch.num_elements} elements are found in the engine's page")
    offsets = torch.empty(scratch.num_elements, dtype=torch.int64)
    offsets[numbers] = places * item
    shaped = offsets.view(scratch.block_tokens, scratch.kv_heads, scratch.num_planes, scratch.head_dim)
    planes = [_separated(shaped[:, :, kv]) for kv in range(scratch.num_planes)]
    whole = tuple(plane for plane in planes if plane is not None)
    if len(whole) != len(planes):
        return Opaque("the place of an element is no sum of a token's, a head's and a channel's")
    return PageMap("discovered", scratch.element, size, whole)


def _separated(offsets: torch.Tensor) -> Plane | None:
    """The tables whose sums are `offsets` (tokens, kv_heads, head_dim); None where there are none."""
    first = offsets[0, 0, 0]
    plane = Plane(
        _table(offsets[:, 0, 0]),
        _table(offsets[0, :, 0] - first),
        _table(offsets[0, 0] - first),
    )
    return plane if plane.offsets().equal(offsets) else None


def _table(values: torch.Tensor) -> Table:
    return tuple(int(value) for value in values.tolist())


@cache
def alphabet(element: torch.dtype) -> torch.Tensor:
    """Numbers of `element` with different bits, the same for ever, near enough to 1 that a scale takes none of them to
    an end, and that every wider float holds them as they are."""
    bits = 8 * element.itemsize
    words = torch.arange(1 << bits) if bits == 8 else torch.randint(0, 1 << bits, (1 << 16,), generator=_source())
    different = torch.tensor(sorted({*words.tolist()} - {UNTOUCHED}))  # an fp8 of these bits would be a number
    patterns = different[torch.randperm(len(different), generator=_source())]
    signed = torch.where(patterns >= 1 << (bits - 1), patterns - (1 << bits), patterns) if bits > 8 else patterns
    numbers = signed.to(WORDS[element.itemsize]).view(element)
    sizes = numbers.float().abs()
    return numbers.view(WORDS[element.itemsize])[(sizes >= NEAR[0]) & (sizes <= NEAR[1])][:VALUES].view(element)


def _source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _rounds(scratch: Scratch) -> int:
    """How many digits the number of an element has."""
    base, count = len(alphabet(scratch.element)), 1
    while base**count < scratch.num_elements:
        count += 1
    return count


def _values(scratch: Scratch, number: int, seed: int) -> torch.Tensor:
    """What round `number` writes: (tokens, kv_heads, kv, head_dim) of `element`. `seed` turns the alphabet."""
    symbols = alphabet(scratch.element)
    order = torch.arange(scratch.num_elements)
    digits = (order // len(symbols) ** number + 17 * seed) % len(symbols)
    values = symbols.view(WORDS[scratch.element.itemsize])[digits].view(scratch.element)
    return values.view(scratch.block_tokens, scratch.kv_heads, scratch.num_planes, scratch.head_dim)


def _written(scratch: Scratch, values: torch.Tensor) -> torch.Tensor:
    """The probed page, uint8 on the CPU, after the operator wrote `values` to it and left all others alone."""
    device = scratch.pages.device
    scratch.pages.fill_(UNTOUCHED)
    planes = []
    for kv, scale in zip(range(scratch.num_planes), scratch.scales, strict=False):
        wide = values[:, :, kv].float() * (scale * NUDGE if scratch.element.itemsize == 1 else 1.0)
        planes.append(wide.to(scratch.given).to(device))
    slots = torch.arange(scratch.block_tokens, device=device) + PROBED * scratch.block_tokens
    scratch.write(planes, slots)
    pages = scratch.pages.cpu()
    others = torch.cat([pages[:PROBED], pages[PROBED + 1 :]])
    if bool((others != UNTOUCHED).any()):
        raise _Astray("the engine's write operator wrote to a page that no slot names")
    return pages[PROBED].clone()
