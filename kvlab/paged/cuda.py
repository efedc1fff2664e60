"""Pages in GPU memory, an arena in pinned host memory, and a small ring of GPU buffers between them.

A load is one DMA per run of slots into a ring buffer and one launch that scatters it to all layers' pages; a save is
the same backwards. The ring is deep enough that DMA and kernels overlap, and the first DMA is under way before
anything else is prepared. The engine's stream waits on events, the CPU on nothing. Kernels never read host memory:
on an H100 that tops out near 35 GB/s where DMA reaches 55.

A save gathers on a stream of its own. On the engine's it would hold the engine up for as long as the link takes for
what the ring does not hold: 7 ms, as reckoned, for 8,192 tokens of Qwen2.5-7B. The pages must then stay as they are
until they are gathered, so pages are named before they are written to (`before_writes`).

A piece is a ring buffer, 16 MiB by default: its DMA takes 0.3 ms, in which the next piece's calls hide. The last kernel
of a load hides behind no DMA; the piece that it moves is a small one. A save's first piece as small made no difference.

Where a block's layers lie together (BLHNC, BLNHC), one driver call with a copy per block needs no ring and no kernel
(`batch`). It was tried for loads and was at no size ahead: 0.52 of a memcpy against 0.67 at 1 MiB and 0.93 against
0.98 at 512: its planning is done before the first byte moves, and the ring's DMAs are larger.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import driver as triton_driver

from kvlab.errors import ConfigError
from kvlab.hostmemory import pin, reserve
from kvlab.paged.driver import copy_to_device, copy_to_host, write_value
from kvlab.paged.kernels import BLOCKS_PER_LAUNCH, PageMover
from kvlab.paged.layout import PageLayout, check_block_ids
from kvlab.paged.slots import runs
from kvlab.sharedmemory import SharedSlots

DEFAULT_STAGING_BYTES = 128 << 20  # of GPU memory, all ring buffers together
RING_DEPTH = 4
LAST_BYTES = 4 << 20  # about: of a load's last piece
TRAIL_LENGTH = 32  # copies that are remembered without asking whether they have ended


class Timing:
    """When work began and ended on the GPU; `seconds` is None until it has ended."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """The work begins behind what `stream` has been given so far."""
        self.start = self.reached = _recorded(stream, timing=True)
        self.end: torch.cuda.Event | None = None

    def reach(self, stream: torch.cuda.Stream) -> None:
        """The engine's own stream comes to the work only now: a copy may begin while the engine still computes."""
        self.reached = _recorded(stream, timing=True)

    def stop(self, stream: torch.cuda.Stream | None = None) -> None:
        """The work ends with what `stream`, by default the current one, has been given so far."""
        self.end = _recorded(stream or torch.cuda.current_stream(), timing=True)

    def seconds(self) -> float | None:
        if self.end is None or not self.end.query():
            return None
        return float(self.start.elapsed_time(self.end)) / 1e3

    def delay(self) -> float:
        """Seconds by which ended work held up the engine's stream."""
        return float(self.reached.elapsed_time(self.end)) / 1e3 if self.end is not None else 0.0


class CudaTransfer:
    """Moves blocks between pages on a GPU and slots of a pinned arena. Safe for several threads.

    Saves run behind what the current stream has been given, on streams of their own, and loads in front of what it is
    given next on another; slots and pages carry events, so that a load of a slot waits for the save that fills it and
    the other way round, and every write to a page for the save that reads it.
    """

    coded_tokens = num_unheard = 0
    blocks_per_launch = BLOCKS_PER_LAUNCH

    def __init__(
        self,
        layout: PageLayout,
        num_slots: int,
        *,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
        shared: SharedSlots | None = None,
        slot_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.layout = layout
        self.device = layout.pages[0].device
        shape = slot_shape or (layout.num_layers, layout.page_bytes)
        block = self._slot_bytes = prod(shape)
        piece_blocks = staging_bytes // (2 * RING_DEPTH) // block  # one ring for loads, one for saves
        if piece_blocks < 1:
            raise ConfigError(
                f"GPU staging of {staging_bytes} bytes must hold {2 * RING_DEPTH} blocks of {block} bytes"
            )
        if piece_blocks > self.blocks_per_launch:
            piece_blocks -= piece_blocks % self.blocks_per_launch  # no launch for a few blocks
        self._last_blocks = max(min(LAST_BYTES // block, piece_blocks), 1)
        self._shared = shared
        memory = shared.slots.reshape(-1) if shared is not None else reserve(num_slots * block)
        unpin = pin(shared.bytes if shared is not None else memory)  # None: pageable memory, which works and is slower
        self._is_pinned = unpin is not None
        self._unpins = [unpin] if unpin is not None else []
        self.arena = torch.from_numpy(memory).view(num_slots, *shape)
        self._mover = self._make_mover()
        self._arena_address = self.arena.data_ptr()
        self._in, self._out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._seen_streams: dict[int, torch.cuda.Stream] = {}
        self._side, self._pack = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self._rings = {name: _Ring((piece_blocks, *shape), self.device) for name in ("in", "out")}
        # Recorded for each piece and waited for in one breath: a wait keeps the record it found.
        self._arrived, self._gathered = torch.cuda.Event(), torch.cuda.Event()
        self._loads, self._saves = _Trail(num_slots), _Trail(num_slots)
        self._gathers = _Trail(layout.num_blocks)  # of pages, by saves
        self._lock = threading.RLock()
        # At the latest when the interpreter ends, while CUDA is still there.
        self._release = weakref.finalize(self, _release, self.device, self._unpins)

    @property
    def staging_bytes(self) -> int:
        """GPU memory the rings take."""
        return sum(ring.num_bytes for ring in self._rings.values())

    def load(self, slots: Sequence[int], block_ids: Sequence[int], num_tokens: Sequence[int] = ()) -> Timing:
        """Slots into pages: the current stream's next work sees them. Returns at once."""
        _check_lengths(slots, block_ids)
        with self._lock:
            timing = self._fill(slots, block_ids, num_tokens)
            self._loads.add(_recorded(self._in), slots)
        return timing

    def _fill(
        self, slots: Sequence[int], block_ids: Sequence[int], num_tokens: Sequence[int], places: Sequence[int] = ()
    ) -> Timing:
        """Blocks into pages: from slots, or from these `places` of lent memory. The lock is held."""
        block, stream = self._slot_bytes, self._in.cuda_stream
        base, unit, step = (self._lent_address, 1, block) if places else (self._arena_address, block, 1)
        timing = Timing(self._in)
        compute: torch.cuda.Stream | None = None
        lists = (block_ids, places or slots, *filter(None, (num_tokens,)))
        for piece, ids, sources, *tokens in self._pieces("in", *lists):
            if not places:
                self._saves.wait(self._in, sources)
            self._in.wait_event(piece.free)
            for into, first, count in runs(sources, step):
                copy_to_device(piece.address + into * block, base + first * unit, count * block, stream)
            self._arrived.record(self._in)
            if compute is None:  # what the first DMA does not need hides behind it
                compute = self._current_stream()
                timing.reach(compute)
                check_block_ids(block_ids, self.layout.num_blocks)  # no page is touched before
            compute.wait_event(self._arrived)
            self._gathers.wait(compute, ids)
            self._mover.scatter(ids, piece.buffer, compute.cuda_stream, *tokens)
            piece.free.record(compute)
        timing.stop(compute)
        return timing

    def save(self, block_ids: Sequence[int], slots: Sequence[int], num_tokens: Sequence[int] = ()) -> Timing:
        """Pages into slots, as they are when the current stream's work so far is done. Returns at once. Before the
        current stream writes to these pages again, `before_writes` must hear of it."""
        _check_lengths(slots, block_ids)
        check_block_ids(block_ids, self.layout.num_blocks)
        block, stream = self._slot_bytes, self._out.cuda_stream
        with self._lock:
            timing = Timing(self._current_stream())
            self._pack.wait_event(timing.start)
            for piece, ids, places, *tokens in self._pieces("out", block_ids, slots, *filter(None, (num_tokens,))):
                self._pack.wait_event(piece.free)
                self._mover.gather(ids, piece.buffer, self._pack.cuda_stream, *tokens)
                self._gathered.record(self._pack)
                self._loads.wait(self._out, places)
                self._out.wait_event(self._gathered)
                for into, first, count in runs(places):
                    target, source = self._arena_address + first * block, piece.address + into * block
                    copy_to_host(target, source, count * block, stream)
                piece.free.record(self._out)
            self._gathers.add(_recorded(self._pack), block_ids)
            ended = timing.end = _recorded(self._out, timing=True, blocking=True)
            self._saves.add(ended, slots)
        return timing

    def clear(self, block_ids: Sequence[int]) -> None:
        """Fill pages with zeros, behind what the current stream has been given and saves that read them."""
        check_block_ids(block_ids, self.layout.num_blocks)
        with self._lock:
            compute = self._current_stream()
            self._gathers.wait(compute, block_ids)
            self._mover.clear(block_ids, compute.cuda_stream)

    def before_writes(self, block_ids: Sequence[int]) -> None:
        """What the current stream does next may write to these pages: it waits for saves that have not read them."""
        if block_ids:
            with self._lock:
                self._gathers.wait(self._current_stream(), block_ids)

    def _current_stream(self) -> torch.cuda.Stream:
        """torch.cuda.current_stream, which takes 8 us to make its answer."""
        handle = triton_driver.active.get_current_stream(self.device.index)
        if handle not in self._seen_streams:
            self._seen_streams[handle] = torch.cuda.current_stream(self.device)
        return self._seen_streams[handle]

    def fence(self) -> torch.cuda.Event:
        """The end of what the current stream has been given so far."""
        return _recorded(torch.cuda.current_stream(self.device))

    def map_lent(self, memory: NDArray[np.uint8]) -> bool:
        """False where CUDA does not pin what can only be read: then copies would hold the engine up."""
        unpin = pin(memory, is_readonly=True)
        if unpin is None:
            return False
        self._unpins.append(unpin)
        self._lent, self._lent_address = memory, memory.ctypes.data
        return True

    def load_lent(
        self,
        places: Sequence[int],
        block_ids: Sequence[int],
        after: torch.cuda.Event | None = None,
        num_tokens: Sequence[int] = (),
    ) -> Timing:
        """`load_aside` from lent memory."""
        _check_lengths(places, block_ids)
        with torch.cuda.device(self.device), torch.cuda.stream(self._side), self._lock:
            if after is not None:
                self._side.wait_event(after)
            return self._fill((), block_ids, num_tokens, places)

    def load_aside(
        self,
        slots: Sequence[int],
        block_ids: Sequence[int],
        after: torch.cuda.Event | None = None,
        num_tokens: Sequence[int] = (),
    ) -> Timing:
        """`load` on a stream of its own, beside the engine's work. Nothing is written to the pages before `after`: who
        had them last may still be reading them, and a save of them may be under way."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._side):
            if after is not None:
                self._side.wait_event(after)
            return self.load(slots, block_ids, num_tokens)

    def take_unfit(self, wait_for: Sequence[int] | None = ()) -> set[int]:
        """None: pages are kept whatever they hold."""
        return set()

    def mark_saved(self, number: int) -> None:
        """Written by the GPU, behind the bytes of the saves so far."""
        if self._shared is None:
            return
        if self._is_pinned:
            write_value(self._shared.copied.ctypes.data, number, self._out.cuda_stream)
        else:
            _recorded(self._out).synchronize()
            self._shared.copied[0] = number

    def clock(self) -> Timing:
        """Starts behind what the current stream has been given so far."""
        return Timing(torch.cuda.current_stream(self.device))

    def slots(self, slots: Sequence[int]) -> torch.Tensor:
        """What `slots` hold once the copies into them have ended, uint8 [blocks, layers, page_bytes]."""
        for event in self._under_way(slots):
            event.synchronize()
        return self.arena[list(slots)]

    def is_settled(self, slots: Sequence[int]) -> bool:
        """Whether no copy uses these slots."""
        return all(event.query() for event in self._under_way(slots))

    def close(self) -> None:
        """Wait for copies under way and unpin the arena."""
        self._release()

    # ----

    def _make_mover(self) -> Any:
        """What moves blocks between pages and a ring buffer."""
        return PageMover(self.layout)

    def _pieces(self, name: str, *lists: Sequence[int]) -> Iterator[Any]:
        """What goes through one ring buffer at a time: the buffer, and its part of each list (block ids, slots...)."""
        ring, at = self._rings[name], 0
        for size in piece_sizes(len(lists[0]), ring.num_blocks, self._last_blocks if name == "in" else 0):
            yield ring.next(), *(each[at : at + size] for each in lists)
            at += size

    def _under_way(self, slots: Sequence[int]) -> list[torch.cuda.Event]:
        """The ends of the copies that use these slots or have used them."""
        with self._lock:
            newest = [trail.newest(slots) for trail in (self._loads, self._saves)]
        return [event for event in newest if event is not None]


def piece_sizes(num_blocks: int, most: int, last: int) -> list[int]:
    """Blocks of each piece; the last holds `last` where these are less than half of all."""
    last = last if num_blocks > 2 * last else 0
    whole, rest = divmod(num_blocks - last, most)
    return [size for size in (*[most] * whole, rest, last) if size]


class _Trail:
    """The copies of one stream that may still be under way, and which of them used each slot (or page) last. A stream
    runs its copies in order: who waits for the newest has waited for all."""

    def __init__(self, num_slots: int) -> None:
        self._last = [0] * num_slots  # numbers of copies; a list, as most copies are of a few slots
        self._events: deque[torch.cuda.Event] = deque()
        self._ended = 0  # the number of the last copy before those of `_events`

    def add(self, event: torch.cuda.Event, slots: Sequence[int]) -> None:
        """`event` is the end of a copy of these slots, and never recorded again."""
        while len(self._events) >= TRAIL_LENGTH and self._events[0].query():
            self._events.popleft()
            self._ended += 1
        self._events.append(event)
        number = self._ended + len(self._events)
        for slot in slots:
            self._last[slot] = number

    def newest(self, slots: Sequence[int]) -> torch.cuda.Event | None:
        """The end of the newest copy of these slots; None if all are known to have ended."""
        last = max(map(self._last.__getitem__, slots)) - self._ended
        return self._events[last - 1] if last > 0 else None

    def wait(self, stream: torch.cuda.Stream, slots: Sequence[int]) -> None:
        """Let `stream` wait for the copies of these slots."""
        event = self.newest(slots)
        if event is not None:
            stream.wait_event(event)


def _recorded(stream: torch.cuda.Stream, *, timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    """`blocking`: a thread that waits for it sleeps. By default it spins and asks the driver without pause, and the
    engine's launches wait for the driver's lock (https://github.com/vllm-project/vllm/pull/47081)."""
    event = torch.cuda.Event(enable_timing=timing, blocking=blocking)
    event.record(stream)
    return event


def _check_lengths(slots: Sequence[int], block_ids: Sequence[int]) -> None:
    if not slots or len(block_ids) != len(slots):
        raise ConfigError(
            f"a copy needs as many slots as blocks and at least one, got {len(slots)} and {len(block_ids)}"
        )


def _release(device: torch.device, unpins: list[Callable[[], None]]) -> None:
    torch.cuda.synchronize(device)
    while unpins:
        unpins.pop()()


@dataclass
class _Buffer:
    """A GPU buffer, and the event after which it is free again."""

    buffer: torch.Tensor
    free: torch.cuda.Event

    def __post_init__(self) -> None:
        self.address = self.buffer.data_ptr()


class _Ring:
    """GPU buffers used in turn."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.num_blocks = shape[0]
        self._buffers = [
            _Buffer(torch.empty(shape, dtype=torch.uint8, device=device), torch.cuda.Event()) for _ in range(RING_DEPTH)
        ]
        self._at = 0

    @property
    def num_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self._buffers)

    def next(self) -> _Buffer:
        self._at = (self._at + 1) % RING_DEPTH
        return self._buffers[self._at]
