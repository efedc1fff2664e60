"""The order of copies: `CudaTransfer` on a make-believe GPU that runs its streams in any order their events allow."""

import ctypes
from collections import deque
from contextlib import contextmanager, nullcontext
from random import Random
from types import SimpleNamespace

import pytest
import torch

from kvlab.errors import ConfigError
from kvlab.paged import cuda, gather, scatter
from kvlab.sharedmemory import SharedSlots
from tests.support.pages import BLOCKS, layout

SLOTS = 9


class Gpu:
    """Streams are queues of closures and of marks to set or to wait for; `pick` chooses which stream goes on."""

    def __init__(self, pick):
        self.pick = pick
        self.streams = []
        self.compute = self.current = self.stream()

    def stream(self, device=None):
        self.streams.append(deque())

        class Stream:
            cuda_stream = len(self.streams) - 1

            def wait_event(self, event):
                event.wait(self)

        return Stream()

    @contextmanager
    def switched(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def event(self, enable_timing=False, blocking=False):
        gpu = self

        class Event:
            mark = None  # of the latest record

            def record(self, stream):
                self.mark = mark = SimpleNamespace(set=False)
                gpu.give(stream.cuda_stream, lambda: setattr(mark, "set", True))

            def wait(self, stream):
                if self.mark is not None:
                    gpu.streams[stream.cuda_stream].append(self.mark)

            def query(self):
                return self.mark is None or self.mark.set

            def synchronize(self):
                gpu.run(until=self.query)

        return Event()

    def give(self, handle, work):
        self.streams[handle].append(work)

    def step(self):
        """One piece of work of some stream; False if none can go on."""
        for queue in self.streams:
            while queue and getattr(queue[0], "set", False):
                queue.popleft()  # a wait that is over
        ready = [queue for queue in self.streams if queue and callable(queue[0])]
        if ready:
            self.pick(ready).popleft()()
        return bool(ready)

    def run(self, until=lambda: False):
        while not until() and self.step():
            pass


class Mover:
    """The kernels as torch operations, queued on the stream that the transfer names."""

    def __init__(self, gpu, pages):
        self.gpu, self.pages = gpu, pages

    def gather(self, block_ids, out, stream):
        ids = list(block_ids)
        self.gpu.give(stream, lambda: gather(self.pages, ids, out[: len(ids)]))

    def scatter(self, block_ids, buffer, stream):
        ids = list(block_ids)
        self.gpu.give(stream, lambda: scatter(self.pages, ids, buffer[: len(ids)]))

    def clear(self, block_ids, stream):
        self.scatter(block_ids, torch.zeros_like(self.pages.buffer(len(block_ids))), stream)


@contextmanager
def transfer_on(gpu, pages, piece_blocks, *, shared=None, is_pinned=False, slot_bytes=0, made=None):
    """A CudaTransfer whose ring buffers hold `piece_blocks` blocks; or `made`, of slots of `slot_bytes`."""

    def copy(target, source, num_bytes, stream):
        gpu.give(stream, lambda: ctypes.memmove(target, source, num_bytes))

    active = SimpleNamespace(get_current_stream=lambda device: gpu.current.cuda_stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", gpu.stream)
        patch.setattr(torch.cuda, "Event", gpu.event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.current)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "stream", gpu.switched)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: gpu.run())
        patch.setattr(cuda, "triton_driver", SimpleNamespace(active=active))
        patch.setattr(cuda, "pin", lambda memory: (lambda: None) if is_pinned else None)
        patch.setattr(cuda, "PageMover", lambda layout: Mover(gpu, layout))
        patch.setattr(cuda, "copy_to_device", copy)
        patch.setattr(cuda, "copy_to_host", copy)
        patch.setattr(cuda, "TRAIL_LENGTH", 1)
        patch.setattr(cuda, "LAST_BYTES", pages.block_bytes)
        size = 2 * cuda.RING_DEPTH * piece_blocks * (slot_bytes or pages.block_bytes)
        transfer = (made or cuda.CudaTransfer)(pages, SLOTS, staging_bytes=size, shared=shared)
        try:
            yield transfer
        finally:
            transfer.close()


@pytest.mark.parametrize(
    ("num_blocks", "sizes"), [(1, [1]), (8, [8]), (9, [5, 4]), (22, [18, 4]), (23, [18, 1, 4]), (40, [18, 18, 4])]
)
def test_a_load_ends_with_a_small_piece(num_blocks, sizes):
    assert cuda.piece_sizes(num_blocks, most=18, last=4) == sizes


def test_other_pieces_are_as_large_as_the_ring_allows():
    assert cuda.piece_sizes(36, most=18, last=0) == [18, 18]
    assert cuda.piece_sizes(40, most=18, last=0) == [18, 18, 4]


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC"])
def test_copies_end_as_if_each_had_run_alone(order):
    """Loads, saves, and an engine that writes into the same few blocks between them."""
    for seed in range(100):
        _play(order, Random(seed))


def _play(order, random):
    _, pages = layout(order)
    gpu = Gpu(random.choice)
    with transfer_on(gpu, pages, piece_blocks=random.randint(1, 3)) as transfer:
        transfer.arena.random_(0, 255)
        want_pages, want_arena = gather(pages, range(BLOCKS), pages.buffer(BLOCKS)), transfer.arena.clone()
        for turn in range(12):
            count = random.randint(1, 7)
            ids = random.sample(range(BLOCKS), count)
            first = random.randrange(SLOTS - count + 1)
            slots = random.choice([list(range(first, first + count)), random.sample(range(SLOTS), count)])
            what = random.choice(["load", "load aside", "save", "write", "clear", "write to slots"])
            if what == "load":
                transfer.load(slots, ids)
                want_pages[ids] = want_arena[slots]
            elif what == "load aside":
                transfer.load_aside(slots, ids, transfer.fence()).end.synchronize()
                want_pages[ids] = want_arena[slots]
                assert torch.equal(gather(pages, ids, pages.buffer(count)), want_pages[ids])
            elif what == "save":
                timing = transfer.save(ids, slots)
                want_arena[slots] = want_pages[ids]
            elif what == "clear":
                transfer.clear(ids)
                want_pages[ids] = 0
            elif what == "write to slots":  # by another process
                if transfer.is_settled(slots):
                    transfer.arena[slots] = want_arena[slots] = turn
            else:
                fresh = torch.full((count, *want_pages.shape[1:]), turn, dtype=torch.uint8)
                transfer.before_writes(ids)
                transfer._mover.scatter(ids, fresh, gpu.compute.cuda_stream)
                want_pages[ids] = fresh
            for _ in range(random.randrange(8)):
                gpu.step()
            if what == "save" and random.random() < 0.3:
                timing.end.synchronize()
                assert torch.equal(transfer.arena[slots], want_arena[slots])
            if random.random() < 0.2:
                assert torch.equal(transfer.slots(slots), want_arena[slots])
        gpu.run()
        assert not any(gpu.streams)
        assert torch.equal(transfer.arena, want_arena)
        assert torch.equal(gather(pages, range(BLOCKS), pages.buffer(BLOCKS)), want_pages)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_shared_memory_says_what_has_been_saved(is_pinned):
    for seed in range(20):
        random = Random(seed)
        _, pages = layout("LBHNC")
        gpu, shared = Gpu(random.choice), SharedSlots(SLOTS, pages.block_bytes)

        def write_value(target, value, stream, gpu=gpu):
            gpu.give(stream, lambda: ctypes.memmove(target, value.to_bytes(8, "little"), 8))

        with (
            transfer_on(gpu, pages, 1, shared=shared, is_pinned=is_pinned) as transfer,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(cuda, "write_value", write_value)
            want = gather(pages, range(6), pages.buffer(6))
            for number in (1, 2, 3):
                first = 2 * number - 2
                transfer.save([first, first + 1], [first, first + 1])
                transfer.mark_saved(number)
            while int(shared.copied[0]) < 3:
                saved = 2 * int(shared.copied[0])
                assert torch.equal(transfer.arena[:saved], want[:saved])
                assert gpu.step()
            assert torch.equal(transfer.arena[:6], want)


@pytest.mark.parametrize("tells", [True, False])
def test_a_save_reads_its_pages_before_they_are_written_to_if_it_is_told(tells):
    """And holds up nobody else: other pages are written to before it has ended."""
    spoilt = 0
    for seed in range(40):
        _, pages = layout("LBHNC")
        gpu = Gpu(Random(seed).choice)
        with transfer_on(gpu, pages, piece_blocks=1) as transfer:
            want = gather(pages, range(5), pages.buffer(5))
            fresh = torch.zeros_like(want)
            timing = transfer.save(range(5), range(5))
            transfer.before_writes([])
            transfer.before_writes(range(5, 10))
            transfer._mover.scatter(range(5, 10), fresh, gpu.compute.cuda_stream)
            while gpu.streams[gpu.compute.cuda_stream]:
                gpu.step()
            assert not timing.end.query(), "five pieces through a ring of four take longer than one write"
            if tells:
                transfer.before_writes([4])
            transfer._mover.scatter(range(5), fresh, gpu.compute.cuda_stream)
            gpu.run()
            spoilt += not torch.equal(transfer.arena[:5], want)
    assert spoilt == 0 if tells else spoilt > 0


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC"])
def test_both_directions_on_two_streams_of_the_engine(order):
    """Only the slots order these copies: nothing else lies between the engine's two streams."""
    for seed in range(60):
        random = Random(seed)
        _, pages = layout(order)
        gpu = Gpu(random.choice)
        with transfer_on(gpu, pages, piece_blocks=2) as transfer:
            second = gpu.stream()
            transfer.arena.random_(0, 255)
            loaded, want = transfer.arena[2:7].clone(), gather(pages, range(5), pages.buffer(5))
            with gpu.switched(second):
                transfer.load(range(2, 7), range(5, 10))
            transfer.save(range(5), range(2, 7))
            for block in range(3):  # others after it, so that it is not the trail's newest
                transfer.save([block], [block // 2])
            with gpu.switched(second):
                transfer.load(range(2, 7), [10, 9, 8, 7, 6])
            gpu.run()
            assert torch.equal(transfer.arena[2:7], want)
            assert torch.equal(gather(pages, [5], pages.buffer(1)), loaded[:1])
            assert torch.equal(gather(pages, [10, 9, 8, 7, 6], pages.buffer(5)), want)


@pytest.mark.parametrize(
    ("slots", "ids", "message"),
    [
        (range(5), [0, 1, 2, 3, BLOCKS], rf"block ids must be in \[0, {BLOCKS}\), got 0 to {BLOCKS}"),
        (range(5), [0, 1, -1, 3, 4], r"got -1 to 4"),
        (range(3), [0, 1], "as many slots as blocks and at least one, got 3 and 2"),
        ([], [], "got 0 and 0"),
    ],
)
def test_a_wrong_copy_is_refused_before_a_byte_of_pages_or_arena_changes(slots, ids, message):
    _, pages = layout("LBHNC")
    gpu = Gpu(Random(0).choice)
    with transfer_on(gpu, pages, piece_blocks=2) as transfer:
        transfer.arena.random_(0, 255)
        before = gather(pages, range(BLOCKS), pages.buffer(BLOCKS)), transfer.arena.clone()
        for refused in (lambda: transfer.load(slots, ids), lambda: transfer.save(ids, slots)):
            with pytest.raises(ConfigError, match=message):
                refused()
        gpu.run()
        assert torch.equal(gather(pages, range(BLOCKS), pages.buffer(BLOCKS)), before[0])
        assert torch.equal(transfer.arena, before[1])
        transfer.load(range(5), range(5))  # and goes on
        gpu.run()
        assert torch.equal(gather(pages, range(5), pages.buffer(5)), before[1][:5])


def test_an_arena_is_unpinned_once():
    _, pages = layout("LBHNC")
    undone = []
    with transfer_on(Gpu(Random(0).choice), pages, piece_blocks=1) as transfer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "pin", lambda memory: lambda: undone.append(memory.nbytes))
            other = cuda.CudaTransfer(pages, 3, staging_bytes=2 * cuda.RING_DEPTH * pages.block_bytes)
        other.close()
        other.close()
        del other
        assert undone == [3 * pages.block_bytes]
        assert transfer.arena.shape[0] == SLOTS
