"""Pages in GPU memory, an arena in pinned host memory, and a small ring of GPU buffers between them.

A load is one DMA per run of slots into a ring buffer and one launch that scatters it to all layers' pages; a save is
the same backwards. The ring is deep enough that DMA and kernels overlap, and the first DMA is under way before
anything else is prepared. The engine's stream waits on events, the CPU on nothing. Kernels never read host memory:
on an H100 that tops out near 35 GB/s where DMA reaches 55.

A piece is a ring buffer, 16 MiB by default: its DMA takes 0.3 ms, in which a launch from Python (0.1 to 0.2 ms) hides,
and the one kernel that hides behind no DMA, the last of a load or the first of a save, takes 10 us. Smaller pieces
were slower: 14 MiB in pieces of 2, 4 and 8 MiB ran at 0.42 of a memcpy on an H100.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kvlab.errors import ConfigError
from kvlab.paged.kernels import PageMover
from kvlab.paged.layout import PageLayout, aligned_bytes

Rows: TypeAlias = NDArray[np.integer]

DEFAULT_STAGING_BYTES = 128 << 20  # of GPU memory, all ring buffers together
RING_DEPTH = 4


@dataclass
class Timing:
    """When work began and ended on the GPU; `seconds` is None until it has ended.

    `reached` is when the engine's own stream came to it: a copy may begin while the engine still computes.
    """

    start: torch.cuda.Event
    end: torch.cuda.Event
    reached: torch.cuda.Event

    def stop(self) -> None:
        """The work ends with what the current stream has been given so far."""
        self.end.record(torch.cuda.current_stream())

    def seconds(self) -> float | None:
        return self.start.elapsed_time(self.end) / 1e3 if self.end.query() else None

    def delay(self) -> float:
        """Seconds by which ended work held up the engine's stream."""
        return float(self.reached.elapsed_time(self.end)) / 1e3


def pinned_arena(num_bytes: int) -> torch.Tensor:
    """Page-locked host memory of exactly `num_bytes` (torch's own pinning rounds up to a power of two).

    Falls back to pageable memory where the driver refuses, which the caller can tell by ``is_pinned()``.
    """
    arena = aligned_bytes(num_bytes)
    torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), num_bytes, 0)
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
            raise ConfigError(
                f"GPU staging of {staging_bytes} bytes must hold {2 * RING_DEPTH} blocks of {block} bytes"
            )
        self.arena = pinned_arena(num_slots * block).view(num_slots, layout.num_layers, layout.page_bytes)
        self._mover = PageMover(layout)
        self._in, self._out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._side = torch.cuda.Stream(self.device)
        self._rings = {name: _Ring(layout, piece_blocks, self.device) for name in ("in", "out")}
        self._reads: list[tuple[torch.cuda.Event, Rows]] = []  # loads under way and the slots they read
        self._writes: list[tuple[torch.cuda.Event, Rows]] = []  # saves under way and the slots they fill
        self._lock = threading.RLock()
        self._closed = False

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    @property
    def staging_bytes(self) -> int:
        """GPU memory the rings take."""
        return sum(ring.num_bytes for ring in self._rings.values())

    def load(self, slots: Sequence[int], block_ids: Sequence[int]) -> Timing:
        """Slots into pages: the current stream's next work sees them. Returns at once."""
        rows, ids = self._checked(slots, block_ids)
        with self._lock:
            compute = torch.cuda.current_stream(self.device)
            timing = _timing()
            _wait_for_slots(self._in, self._writes, rows)
            timing.start.record(self._in)
            timing.reached.record(compute)
            spans = self._pieces(len(rows))
            taken = [self._rings["in"].next() for _ in spans]
            self._fetch(rows, spans[:RING_DEPTH], taken)
            on_device = torch.from_numpy(ids).to(self.device, non_blocking=True)
            for i, (at, end) in enumerate(spans):
                slot = taken[i]
                compute.wait_event(slot.filled)
                self._mover.scatter(on_device, slot.buffer[: end - at], first=at)
                slot.free.record(compute)
                if i + RING_DEPTH < len(spans):
                    self._fetch(rows, spans[i + RING_DEPTH : i + RING_DEPTH + 1], taken[i + RING_DEPTH :])
            timing.end.record(compute)
            self._reads.append((_recorded(self._in), rows))
        return timing

    def _fetch(self, rows: Rows, spans: Sequence[tuple[int, int]], taken: "Sequence[_Buffer]") -> None:
        """Queue the DMAs of these pieces."""
        with torch.cuda.stream(self._in):
            for (at, end), slot in zip(spans, taken, strict=False):
                self._in.wait_event(slot.free)
                for into, first, count in _runs(rows[at:end]):
                    slot.buffer[into : into + count].copy_(self.arena[first : first + count], non_blocking=True)
                slot.filled.record(self._in)

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> Timing:
        """Pages into slots: gathered behind the current stream's work, copied out on another. Returns at once;
        the pages may be overwritten by whatever the current stream does next."""
        rows, ids = self._checked(slots, block_ids)
        with self._lock:
            compute = torch.cuda.current_stream(self.device)
            timing = _timing()
            _wait_for_slots(self._out, self._reads, rows)
            timing.start.record(compute)
            on_device = torch.from_numpy(ids).to(self.device, non_blocking=True)
            ring = self._rings["out"]
            for at, end in self._pieces(len(rows)):
                slot = ring.next()
                compute.wait_event(slot.free)
                self._mover.gather(on_device, slot.buffer[: end - at], first=at)
                slot.filled.record(compute)
                self._out.wait_event(slot.filled)
                with torch.cuda.stream(self._out):
                    for into, first, count in _runs(rows[at:end]):
                        self.arena[first : first + count].copy_(slot.buffer[into : into + count], non_blocking=True)
                slot.free.record(self._out)
            timing.end.record(self._out)
            self._writes.append((_recorded(self._out), rows))
        return timing

    def fence(self) -> torch.cuda.Event:
        """The end of what the current stream has been given so far."""
        return _recorded(torch.cuda.current_stream(self.device))

    def load_and_wait(
        self, slots: Sequence[int], block_ids: Sequence[int], after: torch.cuda.Event | None = None
    ) -> None:
        """`load` on a stream of its own, for threads: the pages are filled when it returns. Nothing is written to them
        before `after`: who had the pages last may still be reading them, and a save of them may be under way."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            if after is not None:
                self._side.wait_event(after)
            timing = self.load(slots, block_ids)
        timing.end.synchronize()

    def clock(self) -> Timing:
        """Starts behind what the current stream has been given so far."""
        timing = _timing()
        timing.start.record(torch.cuda.current_stream(self.device))
        return timing

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        """The content of `slots` once the copies into them have ended: a view where they lie in one run."""
        rows = np.asarray(slots)
        self._settle(rows)
        runs = _runs(rows)
        if len(runs) == 1:
            return self.arena[runs[0][1] : runs[0][1] + runs[0][2]]
        return self.arena[torch.from_numpy(rows)]

    def fill(self, slots: Sequence[int], buffer: torch.Tensor) -> None:
        """Write `buffer`, uint8 [blocks, layers, page_bytes], into slots, once no copy uses them."""
        rows = np.asarray(slots)
        self._settle(rows)
        for into, first, count in _runs(rows):
            self.arena[first : first + count].numpy()[:] = buffer[into : into + count].numpy()

    def close(self) -> None:
        """Wait for copies under way and unpin the arena: memory given back while still registered would make CUDA
        refuse whatever is allocated there next."""
        if not self._closed:
            self._closed = True
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self.arena.data_ptr())

    # ----

    def _checked(self, slots: Sequence[int], block_ids: Sequence[int]) -> tuple[Rows, Rows]:
        rows, ids = np.asarray(slots, np.int64), np.asarray(block_ids, np.int32)
        if ids.size != rows.size or ids.size == 0:
            raise ConfigError(f"a copy needs as many slots as blocks and at least one, got {rows.size} and {ids.size}")
        if ids.min() < 0 or ids.max() >= self.layout.num_blocks:
            raise ConfigError(f"block ids must be in [0, {self.layout.num_blocks}), got {ids.min()} to {ids.max()}")
        return rows, ids

    def _pieces(self, num_blocks: int) -> list[tuple[int, int]]:
        """[at, end) pieces of one ring buffer each."""
        size = self._rings["in"].num_blocks
        return [(at, min(at + size, num_blocks)) for at in range(0, num_blocks, size)]

    def _settle(self, rows: Rows) -> None:
        """Wait until no copy uses these slots."""
        with self._lock:
            under_way = [event for event, used in (*self._reads, *self._writes) if np.isin(rows, used).any()]
        for event in under_way:
            event.synchronize()


def _wait_for_slots(stream: torch.cuda.Stream, copies: list[tuple[torch.cuda.Event, Rows]], rows: Rows) -> None:
    """Let `stream` wait for the copies under way that use these slots; forget those that have ended."""
    copies[:] = [entry for entry in copies if not entry[0].query()]
    for event, used in copies:
        if np.isin(rows, used).any():
            stream.wait_event(event)


def _timing() -> Timing:
    return Timing(*(torch.cuda.Event(enable_timing=True) for _ in range(3)))


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


@dataclass
class _Buffer:
    """A GPU buffer, and the events after which it is filled and free again."""

    buffer: torch.Tensor
    filled: torch.cuda.Event
    free: torch.cuda.Event


class _Ring:
    """GPU buffers used in turn."""

    def __init__(self, layout: PageLayout, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self._buffers = [
            _Buffer(layout.buffer(num_blocks, device=device), torch.cuda.Event(), torch.cuda.Event())
            for _ in range(RING_DEPTH)
        ]
        self._at = 0

    @property
    def num_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self._buffers)

    def next(self) -> _Buffer:
        self._at = (self._at + 1) % RING_DEPTH
        return self._buffers[self._at]


def _runs(rows: Rows) -> list[tuple[int, int, int]]:
    """(position in `rows`, first slot, count) of each run of neighbouring slots: one DMA each."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
    counts = np.diff(np.append(starts, rows.size))
    return [(int(at), int(rows[at]), int(count)) for at, count in zip(starts, counts, strict=True)]
