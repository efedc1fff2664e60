"""Chunks and the tail cover every full block once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.chunking import Chunker
from kvlab.errors import ConfigError


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 20))
def test_spans_cover_every_full_block_once(num_tokens, block, per_chunk):
    chunker = Chunker(chunk_tokens=block * per_chunk, block_tokens=block)
    spans = chunker.spans(num_tokens)
    covered = [b for span in spans for b in range(span.first_block, span.end_block)]
    assert covered == list(range(num_tokens // block))
    assert all(span.num_blocks == per_chunk for span in spans[:-1])


def test_a_chunk_that_is_no_multiple_names_the_nearest():
    with pytest.raises(ConfigError, match="multiple of block_tokens=16, got 100; try 96 or 112"):
        Chunker(chunk_tokens=100, block_tokens=16)
    with pytest.raises(ConfigError, match=r"try 128$"):
        Chunker(chunk_tokens=100, block_tokens=128)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "256"])
def test_sizes_must_be_positive_integers(value):
    with pytest.raises(ConfigError, match="chunk_tokens must be a positive integer"):
        Chunker(chunk_tokens=value)
