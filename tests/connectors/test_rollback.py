"""Plans of steps whose loads failed, in vLLM's own words: who is lowered, by how much, and until when."""

from collections import Counter
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from kvlab.connectors.vllm.scheduler.rollback import StepRollback

BLOCK = 16


def request(name, num_computed):
    return SimpleNamespace(request_id=name, num_computed_tokens=num_computed)


def step(new=(), resumed=(), running=(), drafts=()):
    """`new` and `resumed`: (request, pages, scheduled tokens); `running`: (request, scheduled tokens)."""
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData(
            req_id=asked.request_id,
            prompt_token_ids=[],
            mm_features=[],
            sampling_params=None,
            pooling_params=None,
            block_ids=(pages,),
            num_computed_tokens=asked.num_computed_tokens,
            lora_request=None,
        )
        for asked, pages, _ in new
    ]
    cached = CachedRequestData.make_empty()
    for asked, pages, _ in resumed:
        cached.req_ids.append(asked.request_id)
        cached.resumed_req_ids.add(asked.request_id)
        cached.new_block_ids.append((pages,))
        cached.num_computed_tokens.append(asked.num_computed_tokens)
    output.scheduled_cached_reqs = cached
    output.num_scheduled_tokens = {asked.request_id: count for asked, *_, count in (*new, *resumed, *running)}
    output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
    output.scheduled_spec_decode_tokens = dict(drafts)
    return output


class Engine:
    """Counts computed tokens as vLLM's scheduler does, behind the connector's hook."""

    def __init__(self):
        self.counters = Counter()
        self.rollback = StepRollback(BLOCK, self.counters)

    def plan(self, lost=(), **requests):
        for asked, *_ in (*requests.get("new", ()), *requests.get("resumed", ())):
            self.rollback.on_allocated(asked)
        output = step(**requests)
        self.rollback.apply(output, set(lost))
        everybody = [entry[0] for kind in ("new", "resumed", "running") for entry in requests.get(kind, ())]
        for asked in everybody:
            asked.num_computed_tokens += output.num_scheduled_tokens[asked.request_id]
        return output


@pytest.mark.parametrize("kind", ["new", "resumed"])
def test_a_request_is_lowered_to_its_first_lost_page(kind):
    engine, asked = Engine(), request("a", 70)
    output = engine.plan({12, 13, 14}, **{kind: [(asked, [10, 11, 12, 13, 14, 15], 5)]})
    new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
    assert (new[0].num_computed_tokens if kind == "new" else cached.num_computed_tokens[0]) == 32
    assert asked.num_computed_tokens == 32 + 5
    assert engine.counters == {"load_rollbacks": 1, "rolled_back_tokens": 38}


def test_others_are_left_alone():
    engine, asked, other = Engine(), request("a", 32), request("b", 32)
    engine.plan({11}, new=[(asked, [10, 11, 12], 4), (other, [10, 21, 22], 4)])
    assert (asked.num_computed_tokens, other.num_computed_tokens) == (20, 36)
    engine.plan(new=[(third := request("c", 16), [10, 31], 4)])
    assert third.num_computed_tokens == 20


def test_a_page_behind_the_computed_ones_is_no_hole():
    engine, asked = Engine(), request("a", 32)
    engine.plan({12}, new=[(asked, [10, 11, 12], 4)])
    assert asked.num_computed_tokens == 36


def test_who_shares_the_page_is_lowered_until_it_is_computed():
    engine, asked = Engine(), request("a", 33)
    sharing = [request(f"b{i}", 32) for i in range(3)]
    engine.plan({10, 11}, new=[(asked, [10, 11, 12], 2), (sharing[0], [10, 11, 22], 2)])
    assert (asked.num_computed_tokens, sharing[0].num_computed_tokens) == (2, 2)
    engine.plan(running=[(sharing[0], 14)], new=[(sharing[1], [10, 11, 32], 2)])
    assert sharing[1].num_computed_tokens == 18, "the first page comes with this step, the second does not"
    engine.plan(running=[(sharing[1], 14)], new=[(sharing[2], [10, 11, 42], 2)])
    assert sharing[2].num_computed_tokens == 34
    assert not engine.rollback._holes


def test_a_page_that_was_promised_in_part_is_computed_with_that_part():
    engine, asked = Engine(), request("a", 20)
    engine.plan({10, 11}, new=[(asked, [10, 11], 1)])
    engine.plan(running=[(asked, 20)])  # 21 tokens, the whole prompt
    engine.plan(new=[(other := request("b", 16), [11], 1)])  # the page has gone to another since
    assert other.num_computed_tokens == 17


def test_a_page_whose_request_left_stays_a_hole():
    engine, asked = Engine(), request("a", 33)
    engine.plan({10, 11}, new=[(asked, [10, 11, 12], 2)])
    asked.num_computed_tokens = 0  # preempted
    engine.plan(resumed=[(asked, [50, 51, 52], 40)])  # and computed elsewhere
    engine.plan(new=[(other := request("b", 32), [10, 11, 22], 2)])
    assert other.num_computed_tokens == 2


def test_a_copy_of_a_hole_is_one():
    engine, asked, other = Engine(), request("a", 32), request("b", 24)
    engine.rollback.on_allocated(asked)
    engine.rollback.on_allocated(other)
    output = step(new=[(asked, [10, 11], 1), (other, [10, 21], 1)])
    output.kv_cache_block_copies = [(11, 21)]
    engine.rollback.apply(output, {11})
    assert [new.num_computed_tokens for new in output.scheduled_new_reqs] == [16, 16]


def test_drafts_are_not_computed_in_a_lowered_step():
    engine, asked = Engine(), request("a", 32)
    output = engine.plan({11}, new=[(asked, [10, 11, 12], 4)], drafts={"a": [-1, -1, -1]})
    assert (output.num_scheduled_tokens, output.total_num_scheduled_tokens) == ({"a": 1}, 1)
    assert not output.scheduled_spec_decode_tokens


def test_a_count_that_is_not_ours_stops_the_step():
    engine, asked = Engine(), request("a", 32)
    engine.rollback.on_allocated(asked)
    output = step(new=[(asked, [10, 11, 12], 4)])
    asked.num_computed_tokens += 4  # as if vLLM had counted before it asks
    with pytest.raises(RuntimeError, match="36 computed tokens of request a and plans with 32"):
        engine.rollback.apply(output, {11})
