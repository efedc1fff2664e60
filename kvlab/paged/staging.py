"""Pages in GPU memory, an arena in pinned host memory, and a small ring of GPU buffers between them.

A load is one DMA per run of slots into a ring buffer and one launch that scatters it to all layers' pages; a save is
the same backwards. The ring is deep enough that DMA and kernels overlap. The engine's stream waits on events, the
CPU on nothing. Kernels never read host memory: on an H100 that tops out near 35 GB/s where DMA reaches 55.

Pieces grow from small to large within one load, so that the first scatter starts early and the last is short.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvlab.errors import ConfigError
from kvlab.paged.kernels import PageMover
from kvlab.paged.layout import PageLayout, check_block_ids

DEFAULT_STAGING_BYTES = 128 << 20  # of GPU memory, all ring buffers together
RING_DEPTH = 4
FIRST_PIECE_BYTES = 4 << 20


@dataclass
class Timing:
    """When a copy began and ended on the GPU; `seconds` is None until it has ended."""

    start: torch.cuda.Event
    end: torch.cuda.Event

    def seconds(self) -> float | None:
        return self.start.elapsed_time(self.end) / 1e3 if self.end.query() else None


def pinned_arena(num_bytes: int) -> torch.Tensor:
    """Page-locked host memory of exactly `num_bytes` (torch's own pinning rounds up to a power of two).

    Falls back to pageable memory where the driver refuses, which the caller can tell by ``is_pinned()``.
    """
    arena = torch.empty(num_bytes, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    step = 1 << 36  # very large registrations in one call can fail
    for at in range(0, num_bytes, step):
        size = min(step, num_bytes - at)
        if int(cudart.cudaHostRegister(arena.data_ptr() + at, size, 0)) != 0:
            break
    return arena


class CudaTransfer:
    """Moves blocks between pages on a GPU and slots of a pinned arena. Safe for several threads.

    Saves run behind the current stream on a stream of their own and loads in front of it on another; slots carry
    events, so that a load of a slot waits for the save that fills it and the other way round.
    """

    def __init__(self, layout: PageLayout, num_slots: int, *, staging_bytes: int = DEFAULT_STAGING_BYTES) -> None:
        self.layout = layout
        self.device = layout.pages[0].device
        block = layout.block_bytes
        piece_blocks = staging_bytes // (2 * RING_DEPTH) // block  # one ring for loads, one for saves
        if piece_blocks < 1:
            raise ConfigError(f"GPU staging of {staging_bytes} bytes must hold {2 * RING_DEPTH} blocks of {block} bytes")
        self.arena = pinned_arena(num_slots * block).view(num_slots, layout.num_layers, layout.page_bytes)
        self._mover = PageMover(layout)
        self._in, self._out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._side = torch.cuda.Stream(self.device)
        self._rings = {name: _Ring(layout, piece_blocks, self.device) for name in ("in", "out")}
        self._busy: list[tuple[torch.cuda.Event, frozenset[int]]] = []  # copies under way and their slots
        self._lock = threading.RLock()

    @property
    def staging_bytes(self) -> int:
        """GPU memory the rings take."""
        return sum(ring.num_bytes for ring in self._rings.values())

    def load(self, slots: Sequence[int], block_ids: Sequence[int]) -> Timing:
        """Slots into pages: the current stream's next work sees them. Returns at once."""
        check_block_ids(block_ids, self.layout.num_blocks)
        with self._lock:
            compute = torch.cuda.current_stream(self.device)
            timing = Timing(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._after_others(self._in, slots)
            self._in.wait_stream(compute)  # the pages may still be read by what is queued there
            timing.start.record(self._in)
            ids = self._ids(block_ids)
            for at, end in self._pieces(len(slots)):
                buffer, free = self._rings["in"].next()
                self._in.wait_event(free)
                with torch.cuda.stream(self._in):
                    for into, first, count in _runs(slots[at:end]):
                        buffer[into : into + count].copy_(self.arena[first : first + count], non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._in)
                compute.wait_event(arrived)
                self._mover.scatter(ids[at:end], buffer[: end - at])
                free.record(compute)
            timing.end.record(compute)
            self._note(self._in, slots)
        return timing

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> Timing:
        """Pages into slots: gathered behind the current stream's work, copied out on another. Returns at once;
        the pages may be overwritten by whatever the current stream does next."""
        check_block_ids(block_ids, self.layout.num_blocks)
        with self._lock:
            compute = torch.cuda.current_stream(self.device)
            timing = Timing(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._after_others(self._out, slots)
            timing.start.record(compute)
            ids = self._ids(block_ids)
            for at, end in self._pieces(len(slots)):
                buffer, free = self._rings["out"].next()
                compute.wait_event(free)
                self._mover.gather(ids[at:end], buffer[: end - at])
                gathered = torch.cuda.Event()
                gathered.record(compute)
                self._out.wait_event(gathered)
                with torch.cuda.stream(self._out):
                    for into, first, count in _runs(slots[at:end]):
                        self.arena[first : first + count].copy_(buffer[into : into + count], non_blocking=True)
                free.record(self._out)
            timing.end.record(self._out)
            self._note(self._out, slots)
        return timing

    def load_and_wait(self, slots: Sequence[int], block_ids: Sequence[int]) -> None:
        """`load` on a stream of its own, for threads: the pages are filled when it returns."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            timing = self.load(slots, block_ids)
        timing.end.synchronize()

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        """The content of `slots` once the copies into them have ended: a view where they lie in one run."""
        self._wait_for(slots)
        runs = list(_runs(slots))
        if len(runs) == 1:
            return self.arena[runs[0][1] : runs[0][1] + runs[0][2]]
        return self.arena[torch.as_tensor(slots)]

    def fill(self, slots: Sequence[int], buffer: torch.Tensor) -> None:
        """Write `buffer`, uint8 [blocks, layers, page_bytes], into slots, once no copy uses them."""
        self._wait_for(slots)
        for into, first, count in _runs(slots):
            self.arena[first : first + count] = buffer[into : into + count]

    # ----

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        host = torch.tensor(block_ids, dtype=torch.int32, pin_memory=True)
        return host.to(self.device, non_blocking=True)

    def _pieces(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """[at, end) pieces: small first, doubling up to a ring buffer."""
        largest = self._rings["in"].num_blocks
        size = min(max(FIRST_PIECE_BYTES // self.layout.block_bytes, 1), largest)
        at = 0
        while at < num_blocks:
            end = min(at + size, num_blocks)
            yield at, end
            at, size = end, min(size * 2, largest)

    def _after_others(self, stream: torch.cuda.Stream, slots: Sequence[int]) -> None:
        wanted = frozenset(slots)
        self._busy = [entry for entry in self._busy if not entry[0].query()]
        for event, used in self._busy:
            if used & wanted:
                stream.wait_event(event)

    def _note(self, stream: torch.cuda.Stream, slots: Sequence[int]) -> None:
        event = torch.cuda.Event()
        event.record(stream)
        self._busy.append((event, frozenset(slots)))

    def _wait_for(self, slots: Sequence[int]) -> None:
        wanted = frozenset(slots)
        with self._lock:
            events = [event for event, used in self._busy if used & wanted]
        for event in events:
            event.synchronize()


class _Ring:
    """GPU buffers used in turn, each with the event after which it is free."""

    def __init__(self, layout: PageLayout, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self._buffers = [layout.buffer(num_blocks, device=device) for _ in range(RING_DEPTH)]
        self._free = [torch.cuda.Event() for _ in range(RING_DEPTH)]
        self._at = 0

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers)

    def next(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        self._at = (self._at + 1) % RING_DEPTH
        return self._buffers[self._at], self._free[self._at]


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position in `slots`, first slot, count) of each run of neighbouring slots: one DMA each."""
    at = 0
    while at < len(slots):
        end = at + 1
        while end < len(slots) and slots[end] == slots[end - 1] + 1:
            end += 1
        yield at, slots[at], end - at
        at = end
