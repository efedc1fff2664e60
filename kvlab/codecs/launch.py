"""A program of a codec with all of its arguments but where the data lies and of how many objects: enqueued for some
microseconds, where Triton's own way to a launch takes ten times as long."""

from collections.abc import Sequence
from typing import Any

import torch
from triton.runtime import driver as triton_driver

from kvlab.paged.kernels import run_compiled


class Launch:
    """`program` over `per_object` (x, y, z) instances, x for each object. Its first arguments are `tables`, among which
    the block ids are the second, then parts of the first object's bytes, each from an offset on, then the flags if it
    has some; `rest` ends them."""

    def __init__(
        self,
        program: Any,
        per_object: tuple[int, int, int],
        tables: Sequence[torch.Tensor],
        parts: Sequence[tuple[int, torch.dtype]],
        rest: Sequence[Any],
    ) -> None:
        self._program, self._per_object = program, per_object
        self._pages, self._tables, self._parts = tables[0], tables[1:], parts
        self._rest = rest
        self._kernel: Any = None
        self._addresses = tuple(table.data_ptr() for table in self._tables)

    def __call__(
        self, ids: torch.Tensor, count: int, buffer: torch.Tensor, flags: torch.Tensor | None, stream: int | None
    ) -> None:
        """For `count` objects in `buffer`, uint8 from a multiple of 16 bytes on. `stream`: the current one's handle,
        if it is known."""
        x, y, z = self._per_object
        kernel = self._kernel
        if kernel is None:
            views = [buffer.view(-1)[start:].view(dtype) for start, dtype in self._parts]
            told = [] if flags is None else [flags]
            self._kernel = self._program[(x * count, y, z)](
                self._pages, ids, *self._tables, *views, *told, *self._rest, enable_fp_fusion=False
            )  # None in Triton's interpreter
            return
        if stream is None:
            stream = triton_driver.active.get_current_stream(buffer.device.index)
        base, told_at = buffer.data_ptr(), () if flags is None else (flags.data_ptr(),)
        run_compiled(
            kernel, (x * count, y, z), stream, self._pages.data_ptr(), ids.data_ptr(), *self._addresses,
            *(base + start for start, _ in self._parts), *told_at, *self._rest,
        )  # fmt: skip
