"""Blocks in slots: the twin's bytes and nothing else, on a CPU and by the GPU's programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlab.codecs import PageCodec
from kvlab.codecs.blocks import BlockCodec
from kvlab.codecs.transfer import CodedCPUTransfer, open_coded_transfer
from kvlab.errors import ConfigError
from kvlab.paged import Opaque
from kvlab.serde import get_serde
from tests.test_codec_staging import engine
from tests.test_page_codecs import LAYERS, filled, page_map_of, random_pages

ROOT = Path(__file__).resolve().parent.parent
SPECS = [
    "int8",
    "fp8",
    "int4",
    "int8:k=channel,group=10",
    "int4:k=token",
    "rotated4",
    "centered",
    "centered:bits=8,rotary=4",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["NHC", "CPU vec", "CPU amx"])
@pytest.mark.parametrize("element", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 15, 16])
def test_a_block_comes_back_as_the_twin_has_it_and_the_rest_is_zero(spec, name, element, num_tokens):
    page_map = page_map_of(name, element=element, slack=0 if name != "NHC" else 32)
    pages, _ = filled(page_map, num_tokens)
    codec, twin = BlockCodec(get_serde(spec), page_map, LAYERS), PageCodec(get_serde(spec), page_map)
    slot = torch.full((codec.slot_bytes,), 0xA5, dtype=torch.uint8)
    codec.encode(pages[0], num_tokens, slot)
    want = torch.zeros_like(pages)
    encoded = twin.encode(pages, num_tokens)
    twin.decode(encoded, want)
    found = random_pages(page_map, 1, seed=2)[0]
    codec.decode(slot, num_tokens, found)
    assert found.equal(want[0])
    held = sum(part.numel() * part.element_size() for part in encoded.parts.values())
    assert int(slot.count_nonzero()) <= held, "nothing lies between and behind the parts"


def test_any_bytes_in_a_slot_stay_within_their_tokens():
    page_map = page_map_of("CPU amx")
    free = torch.ones(page_map.page_bytes, dtype=torch.bool)
    for byte in range(2):
        free[page_map.offsets[:9].flatten() + byte] = False
    for spec in SPECS:
        codec = BlockCodec(get_serde(spec), page_map, LAYERS)
        for seed in range(50):
            source = torch.Generator().manual_seed(seed)
            slot = torch.randint(0, 256, (codec.slot_bytes,), dtype=torch.uint8, generator=source)
            pages = random_pages(page_map, 1, seed)[0]
            codec.decode(slot, 9, pages)
            assert not pages[:, free].any()


def test_what_has_no_fixed_rate_or_no_map_is_refused():
    with pytest.raises(ConfigError, match="'lossless' has no fixed size, which slots of host memory need"):
        BlockCodec(get_serde("lossless"), page_map_of(), LAYERS)
    with pytest.raises(ConfigError, match="these pages are opaque: its swizzle"):
        BlockCodec(get_serde("int4"), Opaque("its swizzle"), LAYERS)
    typed = engine(page_map_of())
    with pytest.raises(ConfigError, match="does not fit"):
        open_coded_transfer(
            typed.layout, BlockCodec(get_serde("int8"), page_map_of(heads=4), LAYERS), 4, staging_bytes=0
        )


def test_a_number_that_is_none_makes_its_slot_unfit_and_no_other():
    page_map = page_map_of()
    typed = engine(page_map)
    for layer in typed.layout.pages:
        layer.view(torch.int16)[3] = 0x7FC0  # NaN
    transfer = CodedCPUTransfer(typed.layout, BlockCodec(get_serde("int8"), page_map, LAYERS), 4)
    transfer.save([2, 3, 4], [0, 1, 2], [16, 16, 5])
    assert transfer.take_unfit() == {1}
    assert transfer.take_unfit() == set()
    assert not transfer.arena[1].any()


GPU = """
import sys

import torch

from kvlab.codecs.blocks import BlockCodec
from kvlab.codecs.cuda import CodedMover
from kvlab.serde import get_serde
from tests.test_codec_staging import engine
from tests.test_page_codecs import LAYERS, filled, page_map_of

CASES = (
    ("NHC", "int4", 0, 2), ("CPU amx", "int8", 0, 2), ("NHC", "int8:k=channel,group=10", 32, 2),
    ("CPU amx", "rotated4", 0, 2), ("HNC", "centered", 32, 1),
    ("CPU vec", "centered:bits=8,style=pairs,rotary=4", 0, 2),
)
for name, spec, slack, heads in CASES:
    page_map = page_map_of(name, slack=slack, heads=heads)
    typed = engine(page_map)
    pages, _ = filled(page_map, 16 * 6)
    for layer, view in enumerate(typed.layout.pages):
        view[2:8] = pages[:, layer]
    codec = BlockCodec(get_serde(spec), page_map, LAYERS)
    mover = CodedMover(typed.layout, codec)
    counts, ids = [16, 16, 5, 16, 1, 16], [7, 2, 3, 4, 6, 5]
    room = torch.full((6, codec.slot_bytes), 0xA5, dtype=torch.uint8)
    mover.begin(6, 0)
    mover.gather(ids, room, None, counts)
    want = torch.zeros_like(room)
    for at, (block, count) in enumerate(zip(ids, counts)):
        codec.encode(pages[block - 2], count, want[at])
    assert room.equal(want), (name, spec)
    assert not mover.flags.any()
    before = [view.clone() for view in typed.layout.pages]
    for view in typed.layout.pages:
        view[ids] = 0x5A
    mover.scatter(ids, room, None, counts)
    for at, (block, count) in enumerate(zip(ids, counts)):
        page = torch.empty(LAYERS, page_map.page_bytes, dtype=torch.uint8)
        codec.decode(want[at], count, page)
        assert all(view[block].equal(page[layer]) for layer, view in enumerate(typed.layout.pages)), (name, spec)
    rest = [0, 1, 8, 9, 10, 11]
    assert all(view[rest].equal(old[rest]) for view, old in zip(typed.layout.pages, before))
print("agree")
"""


@pytest.mark.slow
def test_the_gpus_programs_fill_slots_and_pages_as_the_twin_does():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", GPU], capture_output=True, text=True, env=env, cwd=ROOT, timeout=500)
    assert (done.returncode, done.stdout) == (0, "agree\n"), done.stderr[-3000:]
