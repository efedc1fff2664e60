"""Pages on a GPU and slots that hold them encoded: `kvlab.paged.cuda` with a codec in place of its copies.

Streams, rings and their order are those of plain copies: a save encodes into a ring buffer where a copy gathers, a load
decodes where a copy scatters. Only encoded bytes go over the link, and no other copy of them lies in GPU memory.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from kvlab.codecs.addresses import Addresses
from kvlab.codecs.blocks import BlockCodec
from kvlab.codecs.device import device_codec
from kvlab.errors import ConfigError
from kvlab.paged.cuda import CudaTransfer, Timing
from kvlab.paged.driver import copy_to_device
from kvlab.paged.kernels import PageMover
from kvlab.paged.layout import PageLayout
from kvlab.paged.typed import TypedPages
from kvlab.sharedmemory import SharedSlots

_cuda: Any = torch.cuda  # whose events and streams have no types
UNHEARD = 64  # saves whose flags may be under way; a further one waits for the oldest


class CodedMover(PageMover):
    """`PageMover` whose buffers hold slots: `gather` encodes, `scatter` decodes. `flags` are those of the gathers since
    `begin`: for each block whether a number in it is NaN or infinite, int32 (blocks, 2) on the device."""

    def __init__(self, layout: PageLayout, codec: BlockCodec) -> None:
        super().__init__(layout)
        self._blocks = codec
        self._codec = device_codec(codec.serde, Addresses(TypedPages(layout, codec.map, layout.num_layers)))
        self._device = layout.pages[0].device
        self._streams: dict[int, Any] = {}
        self._ids: dict[int, torch.Tensor] = {}  # of each stream, which reads them before they become others
        self.flags, self._told = torch.empty(0), 0
        self._prepare()

    def begin(self, num_blocks: int, stream: int) -> None:
        """Before the gathers of so many blocks."""
        with self._on(stream):
            self.flags, self._told = torch.zeros((num_blocks, 2), dtype=torch.int32, device=self._device), 0

    def gather(
        self, block_ids: Sequence[int], out: torch.Tensor, stream: int | None = None, num_tokens: Sequence[int] = ()
    ) -> None:
        handle = self._handle(stream)
        with self._on(handle):
            out[: len(block_ids)].zero_()  # nothing of what lay there before may stay between the parts
            ids, each = self._upload(block_ids, handle), self._blocks.slot_bytes
            for at, size, count in self._alike(block_ids, num_tokens):
                flags = self.flags[self._told + at :]
                self._codec.encode_blocks(ids[at:], size, count, out[at:], flags, each=each, stream=handle)
            self._told += len(block_ids)

    def scatter(
        self, block_ids: Sequence[int], buffer: torch.Tensor, stream: int | None = None, num_tokens: Sequence[int] = ()
    ) -> None:
        handle, whole = self._handle(stream), self._blocks.map.block_tokens
        alike, is_full = self._alike(block_ids, num_tokens), self._blocks.map.is_full
        with self._on(handle):
            # What is none of the tokens' becomes zero.
            partial = [
                block_id
                for at, size, count in alike
                if count < whole or not is_full
                for block_id in block_ids[at : at + size]
            ]
            if partial:
                self.clear(partial, handle)
            ids, each = self._upload(block_ids, handle), self._blocks.slot_bytes
            for at, size, count in alike:
                self._codec.decode_blocks(ids[at:], size, count, buffer[at:], each=each, stream=handle)

    def _upload(self, block_ids: Sequence[int], stream: int) -> torch.Tensor:
        """Ids on the device, behind what `stream` has been given. Few bytes of pageable memory: the driver takes them
        before it returns, and waits for nothing; pinned memory would have to stay until the copy has ended."""
        if self._device.type != "cuda":  # Triton's interpreter
            return torch.tensor(block_ids, dtype=torch.int32)
        table = self._ids.get(stream)
        if table is None or table.numel() < len(block_ids):
            table = self._ids[stream] = torch.empty(2 * len(block_ids), dtype=torch.int32, device=self._device)
        ids = array("i", block_ids)
        copy_to_device(table.data_ptr(), ids.buffer_info()[0], ids.itemsize * len(ids), stream)
        return table

    def _handle(self, stream: int | None) -> int:
        if stream is None and self._device.type == "cuda":
            stream = int(_cuda.current_stream(self._device).cuda_stream)
        return stream or 0

    def _on(self, handle: int) -> Any:
        """The stream with this handle as the current one."""
        if self._device.type != "cuda":
            return nullcontext()
        if handle not in self._streams:
            # A handle of 0 is the default stream; torch would make a new one of it.
            named = _cuda.ExternalStream(handle, device=self._device) if handle else _cuda.default_stream(self._device)
            self._streams[handle] = named
        return _cuda.stream(self._streams[handle])

    def _alike(self, block_ids: Sequence[int], num_tokens: Sequence[int]) -> list[tuple[int, int, int]]:
        """Runs of blocks with as many tokens each: where the run begins, its blocks, and the tokens."""
        counts = num_tokens or [self._blocks.map.block_tokens] * len(block_ids)
        found, at = [], 0
        for count, run in groupby(counts):
            size = sum(1 for _ in run)
            found.append((at, size, count))
            at += size
        return found

    def _prepare(self) -> None:
        """Compile all programs: block 0 goes out, comes back, and is put as it was."""
        whole = self._blocks.map.block_tokens
        pages = self.layout.pages
        raw = [layer[0].clone() for layer in pages]
        room = torch.empty((1, self._blocks.slot_bytes), dtype=torch.uint8, device=pages[0].device)
        for count in {1, max(whole - 1, 1), whole}:
            self.begin(1, self._handle(None))
            self.gather([0], room, None, [count])
            self.scatter([0], room, None, [count])
        for layer, page in zip(pages, raw, strict=True):
            layer[0] = page


@dataclass
class _Told:
    """Flags of a save on their way to the host, and the slots they are of, in this order."""

    ended: Any  # an event
    flags: torch.Tensor
    slots: tuple[int, ...]


class CodedCudaTransfer(CudaTransfer):
    """Slots in a pinned arena hold what `codec` makes of blocks: uint8 [slots, slot_bytes]."""

    blocks_per_launch = 1  # or as many as there are

    def __init__(
        self,
        layout: PageLayout,
        codec: BlockCodec,
        num_slots: int,
        *,
        staging_bytes: int,
        shared: SharedSlots | None = None,
    ) -> None:
        self.codec = codec
        self.coded_tokens = codec.map.block_tokens
        self._told: deque[_Told] = deque()
        self._unfit: set[int] = set()
        super().__init__(layout, num_slots, staging_bytes=staging_bytes, shared=shared, slot_shape=(codec.slot_bytes,))

    def _make_mover(self) -> CodedMover:
        return CodedMover(self.layout, self.codec)

    def save(self, block_ids: Sequence[int], slots: Sequence[int], num_tokens: Sequence[int] = ()) -> Timing:
        if num_tokens and len(num_tokens) != len(slots):
            raise ConfigError(f"{len(slots)} blocks need as many numbers of tokens, got {len(num_tokens)}")
        with self._lock:
            self._mover.begin(len(slots), self._pack.cuda_stream)
            timing = super().save(block_ids, slots, num_tokens)
            with torch.cuda.stream(self._pack):
                told = _pinned(len(slots))
                told.copy_(self._mover.flags, non_blocking=True)
                ended = _cuda.Event()
                ended.record(self._pack)
            self._told.append(_Told(ended, told, tuple(slots)))
            if len(self._told) > UNHEARD:
                self._told[0].ended.synchronize()
                self._hear()
        return timing

    @property
    def num_unheard(self) -> int:  # type: ignore[override]
        return len(self._told)

    def take_unfit(self, wait_for: Sequence[int] | None = ()) -> set[int]:
        """Of saves whose flags have come."""
        with self._lock:
            asked = None if wait_for is None else frozenset(wait_for)
            wanted = [told for told in self._told if asked is None or not asked.isdisjoint(told.slots)]
            if wanted:  # flags come in the order of saves
                wanted[-1].ended.synchronize()
            self._hear()
            unfit, self._unfit = self._unfit, set()
        return unfit

    def _hear(self) -> None:
        while self._told and self._told[0].ended.query():
            told = self._told.popleft()
            self._unfit.update(slot for slot, odd in zip(told.slots, told.flags[:, 0].tolist(), strict=True) if odd)


def _pinned(num_blocks: int) -> torch.Tensor:
    """Host memory for the flags of so many blocks."""
    return torch.empty((num_blocks, 2), dtype=torch.int32, pin_memory=True)
