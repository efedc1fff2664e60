"""Triton gather and scatter between an engine's pages and one chunk buffer on the GPU, and pages filled with zeros.

One launch moves all layers of up to BLOCKS_PER_LAUNCH blocks: program (block, layer, part) copies one part of a page,
up to 1,024 words. Words are as wide as the sizes and addresses allow; neighbouring threads move neighbouring words,
which the compiler joins into 16-byte accesses. The torch twins are in `reference`.

Block ids travel as arguments of the launch: an upload of them took 25 us on an H100, a tenth of a 14 MiB chunk's time
on the link, and kernels that read them from host memory ran four times as long.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from triton.runtime import driver as triton_driver

from kvlab.paged.layout import PageLayout

BLOCKS_PER_LAUNCH = 32
_PARTS = (1024, 512, 256, 128)  # words
_NO_HOOKS = (None, None, None)  # a launch's metadata, and what is called before and after it
_Kind: TypeAlias = tuple[bool, bool]
_GATHER, _SCATTER, _CLEAR = (False, False), (True, False), (True, True)  # the kernel's TO_PAGES and CLEAR
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


# Ids and sizes vary from call to call: specialising on them would compile again in the middle of serving.
@triton.jit(do_not_specialize=["block_ids", "num_layers", "page_words", "stride_words"])  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]  # Triton reads annotations: only its own may stand here
    page_pointers,
    block_ids,
    buffer,
    stride_words,
    page_words,
    num_layers,
    WORD: tl.constexpr,
    PART: tl.constexpr,
    TO_PAGES: tl.constexpr,
    CLEAR: tl.constexpr,
    ALIGNED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    block = tl.program_id(0)
    layer = tl.program_id(1)
    block_id = block_ids[0]
    for i in tl.static_range(1, len(block_ids)):
        block_id = tl.where(block == i, block_ids[i], block_id)
    stride = stride_words.to(tl.int64)
    if ALIGNED:  # every page starts at a multiple of 16 bytes: say so, for 16-byte accesses
        stride = tl.multiple_of(stride, 16)
    words = tl.program_id(2) * PART + tl.arange(0, PART)
    inside = (words < page_words) if RAGGED else None  # a mask of unknown steps would split every access
    base = tl.load(page_pointers + layer)
    page = base.to(tl.pointer_type(WORD)) + block_id.to(tl.int64) * stride
    if ALIGNED:
        page = tl.multiple_of(page, 16)
    piece = buffer + (block.to(tl.int64) * num_layers + layer) * page_words
    if ALIGNED:
        piece = tl.multiple_of(piece, 16)
    if CLEAR:
        tl.store(page + words, tl.zeros([PART], WORD), mask=inside)
    elif TO_PAGES:
        tl.store(page + words, tl.load(piece + words, mask=inside), mask=inside)
    else:
        tl.store(piece + words, tl.load(page + words, mask=inside), mask=inside)


_TL_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class PageMover:
    """The kernels bound to one layout; pointers and strides are read once, and the kernels are compiled here.

    `gather` and `scatter` move the pages of `block_ids` to or from the beginning of a buffer, uint8 [blocks, layers,
    page_bytes] on the pages' device that starts at a multiple of 16 bytes; `clear` fills pages with zeros. They launch
    on the current stream, whose handle saves looking it up if it is given as `stream`, and return at once. Block ids
    are not checked here.
    """

    def __init__(self, layout: PageLayout) -> None:
        pages = layout.pages
        self.layout = layout
        self._pointers = torch.tensor(layout.addresses, dtype=torch.int64, device=pages[0].device)
        self._address = self._pointers.data_ptr()
        strides = {view.stride(0) for view in pages}
        if len(strides) != 1:
            raise ValueError(f"all layers must have one block stride, got {sorted(strides)}")
        stride = strides.pop()
        common = gcd(stride, layout.page_bytes, *layout.addresses)
        word = next(word for word in _WORDS if common % word == 0)
        words = layout.page_bytes // word
        part = next((part for part in _PARTS if words % part == 0), _PARTS[0])
        self._grid = (layout.num_layers, triton.cdiv(words, part))
        self._dtype = _WORDS[word]
        self._sizes = (stride // word, words, layout.num_layers)
        aligned, ragged = common % (16 * word) == 0, words % part != 0
        kinds = (_GATHER, _CLEAR, _SCATTER)
        self._constants = {kind: (_TL_WORDS[word], part, *kind, aligned, ragged) for kind in kinds}
        # Block 0 goes out, is cleared, and comes back, so that all kernels are loaded.
        self._spare = layout.buffer(1, device=pages[0].device)
        self._kernels = {kind: self._first_launch([0], self._spare, kind) for kind in kinds}

    def gather(self, block_ids: Sequence[int], out: torch.Tensor, stream: int | None = None) -> None:
        self._launch(block_ids, out, stream, _GATHER)

    def scatter(self, block_ids: Sequence[int], buffer: torch.Tensor, stream: int | None = None) -> None:
        self._launch(block_ids, buffer, stream, _SCATTER)

    def clear(self, block_ids: Sequence[int], stream: int | None = None) -> None:
        self._launch(block_ids, self._spare, stream, _CLEAR)

    def _first_launch(self, block_ids: Sequence[int], buffer: torch.Tensor, kind: _Kind) -> Any:
        """Triton's own way to launch; returns the compiled kernel, or None in its interpreter."""
        words = buffer.reshape(-1).view(self._dtype)
        options = (*self._sizes, *self._constants[kind])
        return _move[(len(block_ids), *self._grid)](self._pointers, _padded(block_ids), words, *options)

    def _launch(self, block_ids: Sequence[int], buffer: torch.Tensor, stream: int | None, kind: _Kind) -> None:
        kernel = self._kernels[kind]
        if stream is None and kernel is not None:
            stream = triton_driver.active.get_current_stream(buffer.device.index)
        for at in range(0, len(block_ids), BLOCKS_PER_LAUNCH):
            ids = block_ids[at : at + BLOCKS_PER_LAUNCH]
            skip = 0 if kind == _CLEAR else at  # which touches no buffer
            if kernel is None:
                self._first_launch(ids, buffer[skip:], kind)
                continue
            run_compiled(
                kernel,
                (len(ids), *self._grid),
                stream,
                self._address,
                _padded(ids),
                buffer.data_ptr() + skip * self.layout.block_bytes,
                *self._sizes,
                *self._constants[kind],
            )


def run_compiled(kernel: Any, grid: tuple[int, int, int], stream: int | None, *arguments: Any) -> None:
    """Enqueue a compiled kernel with all of its arguments, tensors as addresses, straight as Triton itself calls it in
    the end: binding and looking up arguments again costs several times the launch, and what `kernel[grid]` prepares for
    profilers' hooks as much again."""
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, *_NO_HOOKS, *arguments)


def _padded(block_ids: Sequence[int]) -> tuple[int, ...]:
    """A kernel is compiled for one number of ids; no program reads those that are added."""
    return (*block_ids, *(0,) * (BLOCKS_PER_LAUNCH - len(block_ids)))
