"""With drafts that read the next token, a block's hash has that token: what it names, and of what requests."""

from types import SimpleNamespace

import pytest

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.compat import draft_ahead, drafts_have_kv
from kvlab.connectors.vllm.kv_groups import KVGroups
from kvlab.connectors.vllm.scheduler.requests import RequestState, request_extras

CHUNKER, BLOCK = Chunker(32, 16), 16
TOKENS = list(range(100, 148))


def hashes(tokens, *, ahead=1, media=()):
    """Of the tokens' blocks; `media`: (name, the first token it takes the place of)."""
    request = SimpleNamespace(
        prompt_token_ids=tokens,
        all_token_ids=tokens,
        num_prompt_tokens=len(tokens),
        mm_features=[SimpleNamespace(mm_position=SimpleNamespace(offset=offset)) for _, offset in media],
    )
    extras = request_extras(request, BLOCK, None, [name for name, _ in media], ahead)
    return RequestState(request, extras, ahead=ahead).extend_hashes(CHUNKER)


def same(one, other) -> int:
    """Leading blocks of one name."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_the_token_behind_a_block_is_of_its_name():
    whole = hashes([*TOKENS, 1])
    assert len(whole) == 3
    assert len(hashes(TOKENS)) == 2, "behind the third block no token is known"
    for at, shared in ((0, 0), (1, 0), (15, 0), (16, 0), (17, 1), (32, 1), (33, 2), (48, 2)):
        other = [*TOKENS, 1]
        other[at] = 7
        assert same(whole, hashes(other)) == shared, at
        assert same(hashes([*TOKENS, 1], ahead=0), hashes(other, ahead=0)) == at // BLOCK
    assert hashes([5]) == hashes([]) == []


def test_an_image_behind_a_block_is_of_its_name_too():
    plain = hashes([*TOKENS, 1])
    for offset, shared in ((0, 0), (16, 0), (17, 1), (32, 1), (33, 2)):
        assert same(plain, hashes([*TOKENS, 1], media=[("image", offset)])) == shared


def test_objects_end_where_the_next_token_is_known():
    groups = KVGroups((None,), BLOCK, ahead=1)
    assert [groups.num_blocks(n) for n in (0, 1, 16, 17, 32, 33)] == [0, 0, 0, 1, 1, 2]
    request = SimpleNamespace(prompt_token_ids=TOKENS, all_token_ids=TOKENS, num_prompt_tokens=48)
    state = RequestState(request, {}, ahead=1, keeps_partial_block=False)
    assert state.object_keys(CHUNKER) == [state.hashes[1]]


@pytest.mark.parametrize(
    ("method", "ahead", "have_kv"),
    [("eagle", 1, True), ("eagle3", 1, True), ("mtp", 1, True), ("draft_model", 0, True), ("ngram", 0, False)],
)
def test_which_drafts_read_the_next_token(method, ahead, have_kv):
    config = SimpleNamespace(speculative_config=SimpleNamespace(method=method))  # of a version that does not say it
    assert (draft_ahead(config), drafts_have_kv(config)) == (ahead, have_kv)
    config.num_prefill_lookahead_tokens = 3
    assert draft_ahead(config) == 3 * ahead
