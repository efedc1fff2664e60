"""Gather and scatter against plain indexing, for every layout an engine may state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.errors import ConfigError
from kvlab.paged import gather, page_layout, scatter, slots
from kvlab.paged.cpu import CPUTransfer
from tests.support.pages import BLOCKS, CONTENT, HEADS, LAYERS, TOKENS, caches, layout


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@settings(max_examples=20)
@given(data=st.data())
def test_gather_then_scatter_elsewhere_moves_whole_blocks(order, dtype, data):
    kv, pages = layout(order, dtype)
    ids = data.draw(st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1, max_size=5))
    before = {name: cache.clone() for name, cache in kv.items()}
    out = torch.full((len(ids), LAYERS, pages.page_bytes), 0xA5, dtype=torch.uint8)
    gather(pages, ids, out)
    target = data.draw(st.permutations(range(BLOCKS)))[: len(ids)]
    scatter(pages, target, out)
    for name, cache in kv.items():
        for block in range(BLOCKS):
            source = ids[target.index(block)] if block in target else block
            assert torch.equal(cache[block].view(torch.uint8), before[name][source].view(torch.uint8))


@pytest.mark.parametrize("order", ["LBHNC", "BLNHC"])
def test_cpu_transfer_agrees_with_the_reference(order):
    _, pages = layout(order)
    transfer = CPUTransfer(pages, num_slots=7)
    want = gather(pages, [3, 1, 9], pages.buffer(3))
    transfer.save([3, 1, 9], [6, 0, 2])
    assert torch.equal(transfer.slots([6, 0, 2]), want)
    transfer.load([6, 0], [5, 4])
    assert torch.equal(gather(pages, [5, 4], pages.buffer(2)), want[:2])
    transfer.arena[[1, 2]] = want[:2]
    assert torch.equal(transfer.slots([1, 2]), want[:2])


def test_a_block_split_into_several_rows_is_one_page():
    kv = {"layer.0": torch.arange(6 * 2 * 8, dtype=torch.int16).reshape(12, 8)}
    pages = page_layout(kv, num_blocks=6, page_bytes={"layer.0": 32}, name="LBNHC")
    assert torch.equal(pages.pages[0][2].view(torch.int16), kv["layer.0"][4:6].reshape(-1))


@pytest.mark.parametrize("order", ["LHBNC", "BHLNC"])
def test_a_scattered_page_is_refused_by_name_and_by_strides(order):
    kv = caches(order)
    size = dict.fromkeys(kv, HEADS * TOKENS * CONTENT * 2)
    with pytest.raises(ConfigError, match="layout must be one of"):
        page_layout(kv, num_blocks=BLOCKS, page_bytes=size, name=order)
    with pytest.raises(ConfigError, match="strides"):
        page_layout(kv, num_blocks=BLOCKS, page_bytes=size, name="LBHNC")


def test_layers_of_two_groups_over_the_same_memory_are_one():
    kv, alone = layout("LBHNC")
    kv |= {f"other.{name}": cache for name, cache in kv.items()}
    size = HEADS * TOKENS * CONTENT * 2
    both = page_layout(kv, num_blocks=BLOCKS, page_bytes=dict.fromkeys(kv, size), name="LBHNC")
    assert both.layer_names == alone.layer_names
    assert (both.addresses, both.block_bytes) == (alone.addresses, alone.block_bytes)


def test_a_page_size_other_than_stated_is_refused():
    kv = caches("LBHNC")
    with pytest.raises(ConfigError, match="one run of 999 bytes"):
        page_layout(kv, num_blocks=BLOCKS, page_bytes=dict.fromkeys(kv, 999), name="LBHNC")


def test_bad_block_ids_and_buffers_are_refused():
    _, pages = layout("LBHNC")
    with pytest.raises(ConfigError, match=r"block ids must be in \[0, 11\), got 11 to 11"):
        gather(pages, [11], pages.buffer(1))
    with pytest.raises(ConfigError, match="chunk buffer must be"):
        gather(pages, [1], pages.buffer(2))


@pytest.mark.parametrize(
    ("listed", "want"),
    [
        ([4], [(0, 4, 1)]),
        (range(3, 6), [(0, 3, 3)]),
        ([3, 4, 5], [(0, 3, 3)]),
        ([5, 4, 3], [(0, 5, 1), (1, 4, 1), (2, 3, 1)]),
        ([1, 2, 0, 7, 8], [(0, 1, 2), (2, 0, 1), (3, 7, 2)]),
        ([0, 2, 1, 3], [(0, 0, 1), (1, 2, 1), (2, 1, 1), (3, 3, 1)]),
    ],
)
def test_runs_of_neighbouring_slots(listed, want):
    assert slots.runs(listed) == want
