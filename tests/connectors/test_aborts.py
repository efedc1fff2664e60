"""Requests that end while their KV is on the way."""

from vllm import SamplingParams

from kvlab.stores.wrappers import LatencyStore
from tests.connectors.engine import connector, core, drain, engine, generate, objects_of, prompt


def test_an_abort_during_a_load_leaves_nothing_behind(tmp_path, expected):
    p, other = prompt(300), prompt(300, ending=0)
    with engine([f"file://{tmp_path}?size=1GiB"], in_thread=True) as llm:
        generate(llm, [p])
        drain(llm)
        scheduler, pool = connector(llm).scheduler, core(llm).kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        secondary = objects_of(llm)
        fast, secondary.store = secondary.store, LatencyStore(secondary.store, latency_s=0.3)
        sampling = SamplingParams(temperature=0, max_tokens=4)
        llm.llm_engine.add_request("gone", {"prompt_token_ids": p}, sampling)
        while not scheduler.loads.in_flight:
            llm.llm_engine.step()
        assert len(scheduler.loads.in_flight) == 1
        assert pool.get_num_free_blocks() < free
        llm.llm_engine.abort_request(["gone"])
        # The pages stay taken while the load may still write to them; another request must not get them.
        answer = generate(llm, [other])[0]
        assert answer.tokens == expected(other)
        while scheduler.loads.in_flight:
            generate(llm, [prompt(31)], max_tokens=1)
        drain(llm)  # what was saved meanwhile is pinned until it is written
        assert not scheduler.index.num_leased_slots
        assert not scheduler._states
        assert pool.get_num_free_blocks() == free
        secondary.store = fast
        again = generate(llm, [p])[0]
        assert (again.hit, again.tokens) == (299, expected(p))
        assert not connector(llm).hook_errors
