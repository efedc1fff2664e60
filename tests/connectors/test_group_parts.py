"""What an object holds of each group: always enough for a hit, never what the engine has given back."""

from hypothesis import given
from hypothesis import strategies as st

from kvlab.chunking import Chunker, Span
from kvlab.connectors.vllm.kv_groups import NO_PAGE, KVGroups

GONE = -1  # the table a connector keeps still names the page, which has another owner by now
windows = st.lists(st.none() | st.integers(1, 90), min_size=1, max_size=3)


def objects(chunker: Chunker, num_tokens: int) -> list[tuple[Span, int]]:
    """The objects of a prompt with their ends in tokens: chunks, a tail, and the page that is filled in part."""
    block = chunker.block_tokens
    found = [(span, span.end_block * block) for span in chunker.spans(num_tokens)]
    full = chunker.num_blocks(num_tokens)
    return found + ([(Span(full, full + 1), num_tokens)] if num_tokens % block > 1 else [])


@given(windows, st.integers(1, 8), st.integers(1, 6), st.integers(2, 200), st.data())
def test_every_object_is_whole_when_saved_and_enough_when_loaded(windows, block, chunk_blocks, num_tokens, data):
    groups, chunker = KVGroups(tuple(windows), block), Chunker(chunk_blocks * block, block)
    total = -(-num_tokens // block)
    stored: dict[int, list[int]] = {}  # end of an object -> its pages
    computed = 0
    while computed < num_tokens:  # the engine computes the prompt in steps of any size
        before, computed = computed, computed + data.draw(st.integers(1, num_tokens - computed), "step")
        tables = [
            [GONE if at < groups.first_block(group, before) else 1000 * (group + 1) + at for at in range(total)]
            for group in range(len(windows))
        ]
        for span, end in objects(chunker, num_tokens):
            if before < end <= computed:
                pages = groups.pages(span, end, tables, before)
                assert pages
                assert GONE not in pages
                assert len(pages) == groups.num_slots(span, end)
                stored[end] = pages
            elif end <= before and groups.have_windows:  # too late: it may be refused, but never read what is gone
                assert GONE not in groups.pages(span, end, tables, before)
    pieces = objects(chunker, num_tokens)
    count = data.draw(st.integers(1, len(pieces)), "objects of the hit") if pieces else 0
    for leave_out in (0, 1):  # another prompt that goes on behind the last object, or one that ends with it
        if not count or (hit := pieces[count - 1][1] - leave_out) < 1:
            continue
        first = data.draw(st.integers(0, (hit - 1) // block), "blocks that the engine has already")
        fills = range(first, -(-hit // block))
        tables = [[1000 * (group + 1) + at for at in range(total)] for group in range(len(windows))]
        filled: dict[int, int] = {}
        for span, end in pieces[:count]:
            slots, at = stored[end], max(span.first_block, first)
            picked, pages = groups.pick(span, end, slots, tables, range(at, min(span.end_block, fills.stop)), hit)
            filled |= zip(pages, picked, strict=True)
        assert sorted(filled) == sorted(groups.needed(tables, fills, hit))
        assert all(page == slot for page, slot in filled.items())


def test_windows_in_numbers():
    groups = KVGroups((None, 40), 16)
    assert [groups.first_block(1, n) for n in (0, 39, 54, 55, 70, 71)] == [0, 0, 0, 1, 1, 2]
    parts = [(p.group, p.first_block, p.end_block, p.offset) for p in groups.parts(Span(4, 8), 128)]
    assert parts == [(0, 4, 8, 0), (1, 5, 8, 4)]  # the last token, 127, sees 88 to 127: from block 5 on
    assert groups.num_slots(Span(4, 8), 128) == 7
    assert groups.pages(Span(0, 1), 16, [[3], [NO_PAGE]], 0) == ()
    assert groups.pages(Span(0, 1), 16, [[3], []], 0) == ()
