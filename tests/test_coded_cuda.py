"""`CodedCudaTransfer` on a make-believe GPU, with the twin in the place of the GPU's programs."""

from functools import partial
from random import Random

import torch

from kvlab.codecs import cuda as coded
from kvlab.codecs.blocks import BlockCodec
from kvlab.serde import get_serde
from tests.test_codec_staging import engine
from tests.test_cuda_transfer import SLOTS, Gpu, Mover, transfer_on
from tests.test_page_codecs import LAYERS, filled, page_map_of

BLOCKS = 12


class Twin(Mover):
    """Queued on the stream that the transfer names, as kernels are. `odd`: a block that holds a NaN."""

    def __init__(self, gpu, pages, codec):
        super().__init__(gpu, pages)
        self.codec, self.flags, self.odd = codec, torch.empty(0, 2), -1

    def _block(self, block_id):
        return torch.stack([layer[block_id] for layer in self.pages.pages])

    def begin(self, num_blocks, stream):
        self.flags = torch.zeros(0, 2, dtype=torch.int32)

    def gather(self, block_ids, out, stream, num_tokens):
        blocks = list(zip(block_ids, num_tokens, strict=True))

        def encode():
            for at, (block_id, count) in enumerate(blocks):
                self.codec.encode(self._block(block_id), count, out[at])

        self.gpu.give(stream, encode)
        self.flags = torch.cat([self.flags, torch.tensor([[int(block_id == self.odd), 0] for block_id in block_ids])])

    def scatter(self, block_ids, buffer, stream, num_tokens):
        blocks = list(zip(block_ids, num_tokens, strict=True))

        def decode():
            for at, (block_id, count) in enumerate(blocks):
                page = torch.empty(LAYERS, self.codec.map.page_bytes, dtype=torch.uint8)
                self.codec.decode(buffer[at], count, page)
                for layer, pages in enumerate(self.pages.pages):
                    pages[block_id] = page[layer]

        self.gpu.give(stream, decode)


def make(monkeypatch, gpu):
    page_map = page_map_of("NHC")
    typed = engine(page_map, BLOCKS)
    pages, _ = filled(page_map, BLOCKS * page_map.block_tokens)
    for layer, view in enumerate(typed.layout.pages):
        view[:] = pages[:, layer]
    codec = BlockCodec(get_serde("int4"), page_map, LAYERS)
    monkeypatch.setattr(coded, "CodedMover", lambda layout, codec: Twin(gpu, layout, codec))
    monkeypatch.setattr(coded, "_pinned", lambda count: torch.empty(count, 2, dtype=torch.int32))

    def made(layout, num_slots, **options):
        return coded.CodedCudaTransfer(layout, codec, num_slots, **options)

    return pages, codec, partial(transfer_on, gpu, typed.layout, slot_bytes=codec.slot_bytes, made=made)


def test_saves_and_loads_end_as_if_each_had_run_alone(monkeypatch):
    for seed in range(25):
        random = Random(seed)
        gpu = Gpu(random.choice)
        want, codec, opened = make(monkeypatch, gpu)
        held = torch.zeros(SLOTS, codec.slot_bytes, dtype=torch.uint8)
        counts_of = {}
        with opened(piece_blocks=random.randint(1, 3)) as transfer:
            for _ in range(8):
                count = random.randint(1, 6)
                ids, slots = random.sample(range(BLOCKS), count), random.sample(range(SLOTS), count)
                if random.random() < 0.5 and all(slot in counts_of for slot in slots):
                    tokens = [counts_of[slot] for slot in slots]
                    copy = random.choice([transfer.load, partial(transfer.load_aside, after=None)])
                    copy(slots, ids, num_tokens=tokens).end.synchronize()
                    for slot, block_id, number in zip(slots, ids, tokens, strict=True):
                        codec.decode(held[slot], number, want[block_id])
                else:
                    tokens = [random.choice([16, 16, 5]) for _ in slots]
                    transfer.save(ids, slots, tokens)
                    for slot, block_id, number in zip(slots, ids, tokens, strict=True):
                        codec.encode(want[block_id], number, held[slot])
                        counts_of[slot] = number
                    transfer.before_writes(range(BLOCKS))
                for _ in range(random.randrange(8)):
                    gpu.step()
            gpu.run()
            for slot in counts_of:
                assert transfer.arena[slot].equal(held[slot])
            for layer, pages in enumerate(transfer.layout.pages):
                assert pages.equal(want[:, layer])


def test_flags_come_with_the_save_that_they_are_of(monkeypatch):
    gpu = Gpu(Random(0).choice)
    _, _, opened = make(monkeypatch, gpu)
    with opened(piece_blocks=1) as transfer:
        transfer._mover.odd = 4
        transfer.save([3, 4, 5], [6, 7, 8], [16, 16, 16])
        assert transfer.take_unfit() == set(), "it has not ended"
        gpu.run()
        assert transfer.take_unfit() == {7}
        assert transfer.take_unfit() == set()
