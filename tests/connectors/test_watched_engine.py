"""`kvlab watch` beside a vLLM that publishes its KV events."""

import json

import kvlab
from kvlab.serving.events import watch
from kvlab.simulation.trace_files import load_traffic, save_traffic
from tests.connectors.engine import BLOCK, engine, generate, prompt

TRIES = 300


def test_what_an_engine_publishes_is_a_trace_that_simulate_reads(tmp_path):
    from vllm.config import KVEventsConfig

    endpoint = f"ipc://{tmp_path}/events"
    publishing = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint, topic="kv")
    with engine(None, {"enable_prefix_caching": True, "kv_events_config": publishing}) as llm:
        states = watch(endpoint, topic="kv", wait_s=0.1)
        # Until the engine knows of its reader, what it publishes is heard by none.
        tries = (generate(llm, [prompt(41 + at)[1 + at :]], max_tokens=1) for at in range(TRIES))
        assert any(heard(states) for _ in tries)
        for asked in (prompt(320, ending=0), prompt(320, ending=1), prompt(320, ending=0)):
            generate(llm, [asked], max_tokens=1)
        state = next(state for _, state in zip(range(TRIES), states, strict=False) if len(long(state.traffic())) == 2)
        states.close()
    assert (state.missed, state.broken, state.block_tokens) == (0, 0, BLOCK)
    save_traffic(state.traffic(), tmp_path / "trace.jsonl")
    trace = load_traffic(tmp_path / "trace.jsonl", block_tokens=BLOCK)
    one, other = long(trace)  # the third was held, and is not told of
    assert one[:9] == other[:9]
    assert one[9] != other[9]
    hits = kvlab.simulate(trace, "1000 blocks", chunk_tokens=BLOCK).hit_tokens.tolist()
    assert hits[-2:] == [0, 9 * BLOCK]
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert max(max(row["hash_ids"]) for row in rows) < sum(len(row["hash_ids"]) for row in rows)  # numbers, no tokens


def heard(states):
    return any(state.rows() for _, state in zip(range(3), states, strict=False))


def long(traffic):
    return [list(request.block_ids) for request in traffic.requests if len(request.block_ids) == 10]
