"""Triton gather and scatter between an engine's pages and one chunk buffer on the GPU.

One launch moves all layers and blocks of a piece: program (block, layer, part) copies up to `_PART_WORDS` words of
one page. Words are as wide as the sizes and addresses allow; neighbouring threads move neighbouring words, which
the compiler joins into 16-byte accesses. The torch twins are in `reference`.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from kvlab.paged.layout import PageLayout

_PART_WORDS = 1024
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


# Sizes vary from call to call: specialising on them would compile again in the middle of serving.
@triton.jit(do_not_specialize=["first", "num_layers", "page_words", "stride_words"])  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]  # Triton reads annotations: only its own may stand here
    page_pointers,
    block_ids,
    first,
    buffer,
    stride_words,
    page_words,
    num_layers,
    WORD: tl.constexpr,
    PART: tl.constexpr,
    TO_PAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block = tl.program_id(0)
    layer = tl.program_id(1)
    words = tl.program_id(2) * PART + tl.arange(0, PART)
    inside = words < page_words
    stride = stride_words.to(tl.int64)
    if ALIGNED:  # every page starts at a multiple of 16 bytes: say so, for 16-byte accesses
        stride = tl.multiple_of(stride, 16)
    base = tl.load(page_pointers + layer)
    page = base.to(tl.pointer_type(WORD)) + tl.load(block_ids + first + block).to(tl.int64) * stride
    if ALIGNED:
        page = tl.multiple_of(page, 16)
    piece = buffer + (block.to(tl.int64) * num_layers + layer) * page_words
    if ALIGNED:
        piece = tl.multiple_of(piece, 16)
    if TO_PAGES:
        tl.store(page + words, tl.load(piece + words, mask=inside), mask=inside)
    else:
        tl.store(piece + words, tl.load(page + words, mask=inside), mask=inside)


_TL_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class PageMover:
    """The kernels bound to one layout; pointers and strides are read once.

    `gather` and `scatter` take block ids as an int32 tensor on the pages' device, and a buffer uint8
    [blocks, layers, page_bytes] there for those from `first` on; they launch on the current stream and return at
    once. Block ids are not checked here: whoever made the tensor has.
    """

    def __init__(self, layout: PageLayout) -> None:
        pages = layout.pages
        self.layout = layout
        self._pointers = torch.tensor([view.data_ptr() for view in pages], dtype=torch.int64, device=pages[0].device)
        strides = {view.stride(0) for view in pages}
        if len(strides) != 1:
            raise ValueError(f"all layers must have one block stride, got {sorted(strides)}")
        self._stride = strides.pop()
        common = gcd(self._stride, layout.page_bytes, *(view.data_ptr() for view in pages))
        self._word = next(word for word in _WORDS if common % word == 0)
        self._aligned = common % (16 * self._word) == 0
        self._words = layout.page_bytes // self._word

    def gather(self, block_ids: torch.Tensor, out: torch.Tensor, *, first: int = 0) -> None:
        self._launch(block_ids, first, out, to_pages=False)

    def scatter(self, block_ids: torch.Tensor, buffer: torch.Tensor, *, first: int = 0) -> None:
        self._launch(block_ids, first, buffer, to_pages=True)

    def _launch(self, block_ids: torch.Tensor, first: int, buffer: torch.Tensor, *, to_pages: bool) -> None:
        grid = (buffer.shape[0], self.layout.num_layers, triton.cdiv(self._words, _PART_WORDS))
        _move[grid](
            self._pointers,
            block_ids,
            first,
            buffer.reshape(-1).view(_WORDS[self._word]),
            self._stride // self._word,
            self._words,
            self.layout.num_layers,
            WORD=_TL_WORDS[self._word],
            PART=_PART_WORDS,
            TO_PAGES=to_pages,
            ALIGNED=self._aligned,
        )
