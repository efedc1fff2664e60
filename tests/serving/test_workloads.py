"""What the workloads send, and what they say could be reused."""

import json

import pytest

from kvlab.datasets.sharegpt import encoder, read_conversations, sharegpt_file
from kvlab.engine import retrieved_line
from kvlab.errors import ConfigError
from kvlab.serving.backends import NAMES, NEEDS_REDIS, from_tiers, named_backend
from kvlab.serving.counters import by_tier, difference, hits_by_prompt, read_counters, read_loads
from kvlab.serving.workloads import make_workload


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharegpt") / "part.json"
    path.write_text(json.dumps(read_conversations(sharegpt_file())[:600]))
    return str(path)


def lines(workload):
    path = workload.args[workload.args.index("--dataset-path") + 1]
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_rounds_hold_what_was_said_before(demo_model_path, part, tmp_path):
    made = [
        make_workload(
            "rounds", tmp_path, tokenizer=demo_model_path, path=part, num_prompts=40, max_prompt_tokens=2000, seed=3
        )
        for _ in range(2)
    ]
    assert made[0] == made[1]
    prompts = [line["prompt"] for line in lines(made[0])]
    assert len(prompts) == made[0].num_prompts == 40
    later = [n for n, text in enumerate(prompts) if text.count("\nAssistant:") > 1]
    grown = [n for n in later if any(text != prompts[n] and prompts[n].startswith(text) for text in prompts[:n])]
    assert len(grown) > 10
    assert 0.3 < made[0].reusable_share < 1
    assert all(4 <= line["output_tokens"] <= 512 for line in lines(made[0]))


def test_documents_are_asked_about_four_times(demo_model_path, part, tmp_path):
    made = make_workload(
        "documents", tmp_path, tokenizer=demo_model_path, path=part, num_prompts=8, max_prompt_tokens=1500
    )
    prompts = [line["prompt"] for line in lines(made)]
    assert len({text.partition("\n\nQuestion:")[0] for text in prompts}) == 2
    assert len(set(prompts)) == 8
    assert 0.6 < made.reusable_share < 0.8  # 6 of 8 prompts but their questions
    assert all(1000 < size <= 1500 for size in made.prompt_lens)
    assert "--custom-output-len" in made.args, "or the client cuts every answer to 256 tokens"


def test_a_trace_keeps_its_times_and_says_its_reuse(tmp_path):
    entries = [
        {"timestamp": 27_000, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]},
        {"timestamp": 27_500, "input_length": 9999, "output_length": 9, "hash_ids": list(range(20))},
        {"timestamp": 29_000, "input_length": 1536, "output_length": 7, "hash_ids": [1, 2, 4]},
    ]
    source = tmp_path / "mooncake.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    made = make_workload("trace", tmp_path, tokenizer="", path=str(source), num_prompts=5, max_prompt_tokens=2048)
    assert [line["timestamp"] for line in lines(made)] == [0, 2000]
    assert made.num_prompts == 2
    assert made.reusable_tokens == 1024
    assert made.prompt_tokens == 1100 + 1536
    with pytest.raises(ConfigError, match="has no request of at most 100 tokens"):
        make_workload("trace", tmp_path, tokenizer="", path=str(source), max_prompt_tokens=100)


def test_equal_prompts_are_counted(demo_model_path, tmp_path):
    turns = [
        {"from": "human", "value": "Tell me a story about a cat, please, and make it long enough to be worth a block."}
    ]
    turns.append({"from": "gpt", "value": "Once upon a time there was a cat."})
    (tmp_path / "twice.json").write_text(json.dumps([{"conversations": turns}] * 3))
    made = make_workload(
        "sharegpt", tmp_path, tokenizer=demo_model_path, path=str(tmp_path / "twice.json"), num_prompts=8
    )
    assert made.num_prompts == 3
    assert made.num_duplicates == 2
    size = len(encoder(demo_model_path)(turns[0]["value"]))
    assert made.reusable_tokens == 2 * (size // 16 * 16) > 0


def test_no_prompt_of_one_first_run_is_in_another(demo_model_path, part, tmp_path):
    sent, prompts = set(), []
    for seed in range(3):
        made = make_workload(
            "sharegpt", tmp_path, tokenizer=demo_model_path, path=part, num_prompts=60, seed=seed, sent=sent
        )
        assert made.num_prompts == 60
        with open(made.args[made.args.index("--dataset-path") + 1]) as file:
            looked_at = {entry["conversations"][0]["value"] for entry in json.load(file)}
        prompts.append(looked_at & sent)
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert len(sent) == sum(map(len, prompts)) <= 180


@pytest.mark.parametrize("name", NAMES)
def test_backends_differ_in_their_cache_alone(name, tmp_path):
    redis, beside = "redis://127.0.0.1:6379", str(tmp_path) if name == "kvlab-serve" else "5555"
    chosen = named_backend(name, cache_bytes=2 << 30, folder=tmp_path, redis_url=redis, beside=beside)
    on = "--enable-prefix-caching" in chosen.flags
    assert on == (name in ("vllm-prefix", "vllm-simple")), "the simple one does nothing without it"
    assert ("--no-enable-prefix-caching" in chosen.flags) != on
    assert len(chosen.flags) == (1 if name in ("none", "vllm-prefix") else 3)
    if len(chosen.flags) == 3:
        assert json.loads(chosen.flags[2])["kv_role"] == "kv_both"
    if name in NEEDS_REDIS:
        with pytest.raises(ConfigError, match="needs a Redis server"):
            named_backend(name, cache_bytes=1, folder=tmp_path)


def test_backends_of_others_are_told_what_their_documents_say(tmp_path):
    def told(name):
        flags = named_backend(name, cache_bytes=4 << 30, folder=tmp_path, beside="6000").flags
        config = json.loads(flags[2])
        return config["kv_connector"], config["kv_connector_extra_config"]

    fs = {"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "root_dir": str(tmp_path)}]}
    assert told("vllm-fs") == ("OffloadingConnector", {"cpu_bytes_to_use": 1 << 30, **fs})
    assert told("vllm-simple") == ("SimpleCPUOffloadConnector", {"cpu_bytes_to_use": 4 << 30})
    mp = {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": 6000}
    assert told("lmcache-mp") == ("LMCacheMPConnector", mp)


def test_any_store_urls_are_a_backend():
    chosen = from_tiers(["memory://?size=1GiB", "redis://somewhere:6380?timeout_ms=50"])
    assert chosen.name == "kvlab memory+redis"
    assert chosen.redis == "redis://somewhere:6380?timeout_ms=50"
    with pytest.raises(ConfigError):
        from_tiers(["memory//"])


def test_counters_and_log_lines_are_read_as_they_are_written():
    metrics = """# HELP vllm:external_prefix_cache_hits_total x
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 320.0
vllm:external_prefix_cache_hits_total{engine="1",model_name="m"} 1.28e+02
vllm:external_prefix_cache_hits_created{engine="0",model_name="m"} 1.7e+09
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 95.0
"""
    found = read_counters(metrics)
    assert found == {"external_prefix_cache_hits": 448, "prompt_tokens_by_source/local_compute": 95}
    assert difference({"external_prefix_cache_hits": 48}, found)["external_prefix_cache_hits"] == 400
    line = retrieved_line(288, 300, 6_635_520, 0.0008)
    log = f"(Worker pid=1) INFO 11-24 08:10:35 [worker.py:118] {line} (memory) for cmpl-bench-7-0-ab\n{line} (lower)\n"
    loads = read_loads(log)
    assert [(one.hit_tokens, one.prompt_tokens, one.tier) for one in loads] == [
        (288, 300, "memory"),
        (288, 300, "lower"),
    ]
    assert hits_by_prompt(loads, [0] * 9, "bench-") == [0] * 7 + [288, 0]
    lmcache = (
        "(EngineCore pid=9) [2026-11-25 03:24:11,262] LMCache INFO:\x1b[0m [req_id=cmpl-bench-3-0-a459] Retrieved 1280"
        " out of 1280 required tokens (from 1281 total tokens). size: 0.0684 gb, cost 102.5570 ms, throughput: 0.6666"
        " GB/s; \x1b[3m(cache_engine.py:958:lmcache.v1.cache_engine)\x1b[0m\n"
    )
    (told,) = read_loads(lmcache)
    assert (told.hit_tokens, told.prompt_tokens, told.tier, told.ms) == (1280, 1281, "lmcache", 102.557)
    assert told.num_bytes == pytest.approx(1280 * 57_344, rel=1e-3)
    assert hits_by_prompt([told], [0] * 9, "bench-")[3] == 1280
    assert by_tier(loads)["memory"]["gb_per_s"] == pytest.approx(6.6e6 / 0.8e6, rel=0.01)
