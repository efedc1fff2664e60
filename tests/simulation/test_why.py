"""The miss page of a request, against a replay that writes down who drove out what."""

import random
from collections import OrderedDict

import pytest

import kvlab
from kvlab.errors import ConfigError
from kvlab.simulation.cost import Prefill
from kvlab.simulation.traffic import Request, Traffic
from kvlab.simulation.why import why

SYSTEM = list(range(64))


def traffic_of(seed, requests=60):
    """Chats that go on, of one block a turn."""
    draw = random.Random(seed)
    chats, made, fresh = [], [], 0
    for number in range(requests):
        if not chats or draw.random() < 0.4:
            chats.append([0])
        chat = draw.choice(chats)
        for _ in range(draw.randint(1, 3)):
            fresh += 1
            chat.append(fresh)
        made.append(Request(float(number), 16 * len(chat), 1, list(chat)))
    return Traffic("made", 16, made)


def left_at(traffic, block, capacity):
    """The request whose storing drove `block` out of an LRU of so many blocks, the last time."""
    held, gone = OrderedDict(), None
    for number, request in enumerate(traffic.requests[:-1]):
        found = request.block_ids
        while found and any(one not in held for one in found):
            found = found[:-1]
        for one in (*reversed(found), *found):
            held.move_to_end(one)
        for one in request.block_ids:
            if one not in held:
                while len(held) >= capacity:
                    out = held.popitem(last=False)[0]
                    gone = number if out == block else gone
                held[one] = None
        for one in reversed(request.block_ids):
            if one in held:
                held.move_to_end(one)
    return gone


@pytest.mark.parametrize("seed", range(8))
def test_an_eviction_names_the_request_that_drove_it_out(seed):
    traffic, capacity = traffic_of(seed), 40
    found = 0
    for number in range(len(traffic.requests)):
        page = why(traffic, number, f"{capacity} blocks", chunk_tokens=16)
        run = kvlab.simulate(traffic.head(number + 1), f"{capacity} blocks", chunk_tokens=16)
        assert page.hit_tokens == run.hit_tokens[-1]
        if page.reason != "evicted":
            assert page.seen_tokens == page.hit_tokens
            continue
        found += 1
        asked = traffic.requests[number]
        block = asked.block_ids[page.eviction.block]
        assert page.eviction.left_at == left_at(traffic.head(number + 1), block, capacity)
        assert block in traffic.requests[page.eviction.used_by].block_ids
        assert page.eviction.used_by < page.eviction.left_at < number
        kept = kvlab.simulate(traffic.head(number + 1), f"{int(capacity * page.keeps)} blocks", chunk_tokens=16)
        assert kept.hit_tokens[-1] == page.seen_tokens
        assert next(row for row in page.policies if row["policy"] == "lru")["hit_tokens"] == page.hit_tokens
    assert found


def test_the_token_that_differs_is_named_with_the_prompt_it_differs_from():
    prompts = [SYSTEM + [1] * 40, SYSTEM + [2] * 40, SYSTEM + [1] * 20 + [3] * 20]
    page = why(prompts, chunk_tokens=16)
    assert page.reason == "differs"
    assert (page.difference.nearest, page.difference.token) == (0, 84)
    assert (page.difference.ours, page.difference.theirs) == (3, 1)
    assert page.hit_tokens == page.seen_tokens == 80


def test_prompts_that_share_no_block_are_compared_by_tokens():
    page = why([[1, 2, 3] + [4] * 40, [1, 2, 9] + [4] * 40], chunk_tokens=16)
    assert "Token 2 is 9, and 3 in request 0, the nearest." in page.lines()


def test_a_prompt_that_is_longer_than_all_others_goes_on():
    page = why([SYSTEM, SYSTEM + [7] * 32], chunk_tokens=16)
    assert "It goes on where request 0 ends, at token 64." in page.lines()


def test_the_first_of_its_kind_and_a_whole_hit():
    assert why([SYSTEM, [99] * 64], chunk_tokens=16).reason == "first"
    page = why([SYSTEM, SYSTEM], chunk_tokens=16)
    assert (page.reason, page.difference, page.eviction) == ("hit", None, None)
    assert page.hit_tokens == page.tokens


def test_the_page_is_html_and_says_milliseconds():
    traffic = traffic_of(0)
    number = next(n for n in range(60) if why(traffic, n, "40 blocks", chunk_tokens=16).reason == "evicted")
    page = why(traffic, number, "40 blocks", chunk_tokens=16, prefill=Prefill.at_rate(1000))
    assert page.ms["computed"] == page.tokens - page.hit_tokens
    assert page.ms["least"] <= page.ms["computed"]
    html = page._repr_html_()
    assert "evicted" in html
    assert "<td>s3fifo</td>" in html
    assert "evicted" in repr(page)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"request": 9}, "request must be a place in a trace of 2, got 9"),
        ({"policy": "belady"}, "needs the policy of a store"),
        ({"request": 0}, "request 0 has no full block of 16 tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        why([[1, 2, 3], SYSTEM], **arguments)
