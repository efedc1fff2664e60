"""The miss page of a request, against a replay that writes down who drove out what."""

import random
from collections import OrderedDict

import pytest

import kvlab
from kvlab.errors import ConfigError, FormatError
from kvlab.simulation.cost import Prefill
from kvlab.simulation.replay_connector import ConnectorRules
from kvlab.simulation.trace_files import load_traffic, save_traffic
from kvlab.simulation.traffic import Request, Traffic, traffic_of_prompts
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


def test_a_prompt_that_ends_within_anothers_chunk_is_no_hit():
    page = why([SYSTEM, SYSTEM[:32]], chunk_tokens=64)
    assert (page.reason, page.hit_tokens) == ("within_chunk", 0)
    assert "Request 0 has all of it, in a chunk that ends behind this prompt." in page.lines()
    assert why([SYSTEM[:32], SYSTEM, SYSTEM[:32]], chunk_tokens=64).reason == "hit"


def test_a_prompt_that_a_cache_may_not_serve_is_no_hit():
    requests = [Request(float(at), 32, 0, [1, 2], loads=not at) for at in range(2)]
    assert why(Traffic("marked", 16, requests), chunk_tokens=16, connector=True).reason == "not_loaded"


def test_what_is_held_and_too_short_to_load_is_told_beside_what_left():
    rules = ConnectorRules(min_hit_tokens=33)
    prompts = [SYSTEM, [99] * 32, SYSTEM]
    page = why(prompts, -1, "4 blocks", chunk_tokens=16, connector=rules)
    assert (page.reason, page.too_short_tokens, page.hit_tokens, page.eviction.block) == ("too_short", 32, 0, 2)
    assert page.lines()[2].startswith("32 tokens had been there: block 2 was last used by request 0 and left while")


@pytest.mark.parametrize("wrong", [{"save_partial_block": "no"}, {"min_hit_tokens": 0}, {"min_hit_tokens": True}])
def test_rules_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        ConnectorRules(**wrong)
    with pytest.raises(ConfigError, match="connector must be true, false or ConnectorRules, got 'yes'"):
        kvlab.simulate([SYSTEM], connector="yes")


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


@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo"])
def test_a_block_left_where_the_tier_lacks_it_from_then_on(policy):
    """Prompts that go back to earlier ones, and some that are larger than the tier."""
    draw, found = random.Random(2), 0
    for _ in range(60):
        stems = [[draw.randrange(4) for _ in range(6)] for _ in range(3)]
        asked = [
            [*draw.choice(stems)[: draw.randint(1, 6)], draw.randrange(50, 90)] for _ in range(draw.randint(5, 14))
        ]
        prompts = [[token for block in blocks for token in [block] * 16] for blocks in asked]
        capacity = f"{draw.randint(4, 9)} blocks"
        page = why(prompts, -1, capacity, policy=policy, policies=(), chunk_tokens=16)
        if page.eviction is None:
            continue
        found += 1
        traffic = traffic_of_prompts(prompts)
        block = traffic.requests[-1].block_ids[page.eviction.block]
        last = max(at for at, request in enumerate(traffic.requests[:-1]) if block in request.block_ids)
        there = [
            block in kvlab.simulate(traffic.head(at + 1), capacity, policy=policy, chunk_tokens=16).held[0]
            for at in range(last, len(prompts) - 1)
        ]
        assert (page.eviction.used_by, page.eviction.left_at) == (last, last + there.index(False))
    assert found > 10


def test_what_admission_did_not_store_is_no_hit():
    page = why([SYSTEM, SYSTEM], chunk_tokens=16, admission=2)
    assert (page.reason, page.hit_tokens, page.refused_tokens) == ("not_stored", 0, 64)
    assert "64 tokens more an earlier prompt has had, and admission did not store them." in page.lines()
    assert why([SYSTEM] * 3, chunk_tokens=16, admission=2).reason == "hit"


def test_prompts_that_are_not_loaded_or_not_saved_are_replayed_as_the_connector_does(tmp_path):
    marks = [{"saves": False}, {}, {"loads": False}, {}]
    traffic = Traffic("marked", 16, [Request(float(at), 32, 0, [1, 2], **mark) for at, mark in enumerate(marks)])
    save_traffic(traffic, tmp_path / "marked.jsonl")
    loaded = load_traffic(tmp_path / "marked.jsonl", block_tokens=16)
    assert [(each.loads, each.saves) for each in loaded.requests] == [
        (True, False),
        (True, True),
        (False, True),
        (True, True),
    ]
    for each in (traffic, loaded):
        run = kvlab.simulate(each, "10 blocks", chunk_tokens=16, connector=True)
        assert run.hit_tokens.tolist() == [0, 0, 0, 32]
        for other in ({}, {"policy": "belady", "connector": True}):
            with pytest.raises(ConfigError, match="connector=True replays them"):
                kvlab.simulate(each, "10 blocks", chunk_tokens=16, **other)
    (tmp_path / "marked.jsonl").write_text((tmp_path / "marked.jsonl").read_text().replace("false", '"no"'))
    with pytest.raises(FormatError, match="line 1: saves must be true or false, got 'no'"):
        load_traffic(tmp_path / "marked.jsonl", block_tokens=16)
