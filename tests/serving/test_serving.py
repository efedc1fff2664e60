"""The serving benchmark for real: vLLM's server and client, a small model, every tier, and what may go wrong."""

import json
import re
import socket

import numpy as np
import pytest

from kvlab.datasets.sharegpt import encoder, read_conversations, sample, sharegpt_file
from kvlab.errors import ConfigError, KVLabError
from kvlab.machine.redis_server import RedisServer
from kvlab.plotting.serving import itl_over_time, reduction_bars, ttft_cdf
from kvlab.serving import report, run, serving_block
from kvlab.serving.latency import summary
from kvlab.serving.server import Server, environment
from kvlab.serving.tables import compare, read_rows
from kvlab.serving.workloads import make_workload
from tests.connectors.engine import PATIENT
from tests.connectors.models import TOKEN_BYTES, short_demo
from tests.support.serving import BLOCK, MARK, ONE_PROCESS, SERVER, marked, small_file

NUM_PROMPTS = 16
BACKENDS = ["kvlab-disk", "kvlab-redis"]  # none and kvlab-memory are in the runs that take turns


@pytest.fixture(scope="module", autouse=True)
def _threads_as_servers_choose_them():
    """What tests/conftest.py says of threads is for engines in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two runs each of two backends on the same prompts: the rows, and the folder with the client's results."""
    folder = tmp_path_factory.mktemp("serving")
    part = folder / "part.json"
    conversations = read_conversations(sharegpt_file())[:600]
    firsts = [(entry, entry["conversations"][0]["value"]) for entry in conversations if entry["conversations"]]
    short = [entry for entry, text in firsts if 300 < len(text) < 1800]
    part.write_text(json.dumps(short))
    with RedisServer() as redis:
        rows = run(
            BACKENDS,
            model=short_demo(),
            dataset_path=str(part),
            num_prompts=NUM_PROMPTS,
            request_rate=6,
            output_len=6,
            cache_size="512MiB",
            redis_url=f"{redis.url}?timeout_ms=60000",
            server_flags=SERVER,
            settings=PATIENT,
            env=ONE_PROCESS,
            warmups=1,
            folder=folder,
            out=folder / "rows.jsonl",
        )
    return rows, folder


@pytest.mark.timeout(1200)
def test_every_run_answers_every_prompt_with_the_same_settings(measured):
    rows, folder = measured
    assert [(row["backend"], row["run"]) for row in rows] == [(name, turn) for name in BACKENDS for turn in (1, 2)]
    assert read_rows(folder / "rows.jsonl") == json.loads(json.dumps(rows))
    for row in rows:
        assert row["completed"] == NUM_PROMPTS
        assert row["failed"] == 0
        assert row["duplicate_prompts"] == 0
        args = row["client_args"]
        assert args[args.index("--temperature") + 1] == "0"
        assert args[args.index("--num-warmups") + 1] == args[args.index("--ready-check-timeout-sec") + 1] == "0"
        assert "--no-oversample" in args
        assert "--no-enable-prefix-caching" in row["server_args"]
        assert row["counters"].get("prefix_cache_hits", 0) == 0  # vLLM's own cache served nothing
        assert row["same_texts"] >= 0.9  # other batches may round otherwise
        assert row["commit"]
        assert "vllm" in row["versions"]
    assert len({tuple(row["input_lens"]) for row in rows}) == 1
    shared = [[arg for arg in row["server_args"] if not arg.isdigit() and "kv_connector" not in arg] for row in rows]
    assert all(set(SERVER) - {arg for arg in SERVER if arg.isdigit()} <= set(args) for args in shared)


@pytest.mark.timeout(1200)
def test_statistics_are_those_of_vllm(measured):
    rows, folder = measured
    results = [json.loads(path.read_text()) for path in folder.glob("result-*.json")]
    assert len(results) == len(rows)
    for details in results:
        for name, value in summary(details).items():
            assert value == pytest.approx(details[name], abs=1e-6, rel=1e-6), name


@pytest.mark.timeout(1200)
def test_second_runs_hit_every_prompt_to_its_last_token(measured):
    for row in measured[0]:
        if row["run"] == 1:  # the warm-up and the server's start cached none of the prompts
            assert row["hit_tokens"] <= row["reusable_share"] * row["total_input_tokens"]
        else:
            long = [
                (size, hit)
                for size, hit in zip(row["input_lens"], row["prompt_hits"], strict=True)
                if size >= 2 * BLOCK
            ]
            assert len(long) > NUM_PROMPTS // 2
            assert all(hit == size - 1 for size, hit in long)
            assert sum(row["prompt_hits"]) == row["hit_tokens"] == row["loaded_tokens"]
            pages = sum(-(-hit // BLOCK) for hit in row["prompt_hits"])
            assert sum(tier["bytes"] for tier in row["tiers"].values()) == pytest.approx(
                pages * BLOCK * TOKEN_BYTES, rel=0.02
            )
            assert row["stored_bytes"] > row["hit_tokens"] * TOKEN_BYTES


@pytest.fixture(scope="module")
def in_turns(tmp_path_factory):
    """Two runs each of two backends that take turns, on two datasets: the rows, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("together")
    rows = run(
        ["none", "kvlab-memory"],
        model=short_demo(),
        dataset_path=str(small_file(folder)),
        dataset=["sharegpt", "rounds"],
        num_prompts=[6, 4],
        request_rate=[4, 2],
        together=True,
        output_len=4,
        max_prompt_tokens=700,
        cache_size="256MiB",
        server_flags=[*SERVER, "--max-num-seqs", "2"],
        backend_flags={"kvlab-memory": ["--max-num-seqs", "4"]},
        warmups=0,
        folder=folder,
    )
    return rows, folder


@pytest.mark.timeout(600)
def test_servers_that_run_together_take_turns_on_every_dataset(in_turns):
    rows, folder = in_turns
    turns = [(name, turn) for turn in (1, 2) for name in ("none", "kvlab-memory")]
    assert [(row["dataset"], row["num_prompts"], row["backend"], row["run"]) for row in rows] == [
        (dataset, count, *turn) for dataset, count in (("sharegpt", 6), ("rounds", 4)) for turn in turns
    ]
    assert all(row["completed"] == row["num_prompts"] and row["together"] == 2 for row in rows)
    assert all(row["same_texts"] == 1 for row in rows)
    for row in (row for row in rows if row["backend"] == "none"):
        assert row["hit_tokens"] == row["hit_prompts"] == 0
        assert row["loaded_tokens"] is None
        assert row["tiers"] == {}
    assert all(row["hit_tokens"] > 0 for row in rows if row["backend"] == "kvlab-memory" and row["run"] == 2)
    for row in rows:
        last = len(row["server_args"]) - row["server_args"][::-1].index("--max-num-seqs")
        assert row["server_args"][last] == ("2" if row["backend"] == "none" else "4")
    assert report(rows).count("| none |") == 2
    logs = [path.read_text() for path in folder.glob("server-*.log")]
    assert len(logs) == 2
    assert len({re.search(r"core ids=\[[\d, ]*\]", log)[0] for log in logs}) == 1, "the same cores for both"


@pytest.mark.timeout(1200)
def test_it_is_reported_and_drawn(measured, in_turns):
    rows, beside = measured[0], in_turns[0]
    rows = rows + [row for row in beside if row["dataset"] == "sharegpt"]
    table = report(rows)
    assert all(f"| {name} |" in table for name in {row["backend"] for row in rows})
    compared = {one.backend: one for one in compare(rows)}
    assert all(one.verdict in ("not faster", "slower", "faster") for one in compared.values())  # this machine is busy
    block = serving_block(rows[3])
    assert f"{rows[3]['mean_ttft_ms']:.2f}" in block
    assert "Successful requests:" in block
    bars = reduction_bars(
        list(compared),
        [c.first["mean_ttft_ms"] for c in compared.values()],
        [c.last["mean_ttft_ms"] for c in compared.values()],
        title="t",
    )
    assert len(bars.data[1].y) == len(compared) == 4
    assert len(ttft_cdf(rows, title="t").data) == len(rows)
    assert len(itl_over_time(rows[:2], title="t").data[0].x) > 1


def test_a_second_run_that_is_not_faster_is_shown_as_such():
    rng = np.random.default_rng(1)
    base = rng.uniform(50, 70, 200)
    fields = {
        "dataset": "d",
        "model": "m",
        "num_prompts": 200,
        "request_rate": 1,
        "total_input_tokens": 10,
        "hit_tokens": 0,
    }
    rows = [
        {
            "backend": name,
            "run": turn,
            "ttfts_ms": list(times),
            "mean_ttft_ms": times.mean(),
            "p99_ttft_ms": 1.0,
            "mean_tpot_ms": 1.0,
            **fields,
        }
        for name, factor in (("same", 1.0), ("worse", 1.1), ("better", 0.5))
        for turn, times in ((1, base), (2, base * factor + rng.normal(0, 1, 200)))
    ]
    assert [one.verdict for one in compare(rows)] == ["not faster", "slower", "faster"]
    assert "First runs" not in report(rows)
    assert "| same |" in report(rows)
    assert "not faster" in report(rows)
    claimed = [row | {"hit_tokens": 8, "loaded_tokens": 2 if row["backend"] == "better" else 8} for row in rows]
    assert [one.verdict for one in compare(claimed)] == ["not faster", "slower", "hits not loaded"]
    assert "| 80.0%, 75.0% of them not loaded |" in report(claimed)
    in_process = [row | {"backend": "lmcache-cpu" if row["backend"] == "same" else row["backend"]} for row in rows]
    assert "| lmcache-cpu (deprecated) |" in report(in_process)


def test_a_request_that_failed_is_told_and_leaves_the_others_in_pairs():
    times = np.linspace(10.0, 1000.0, 100)
    first, last = list(times), list(times * 0.5)
    first[3] = last[90] = None
    fields = {"dataset": "d", "model": "m", "num_prompts": 100, "request_rate": 1, "total_input_tokens": 10}
    fields |= {"hit_tokens": 0, "mean_ttft_ms": 1.0, "p99_ttft_ms": 1.0, "mean_tpot_ms": 1.0, "backend": "mine"}
    rows = [fields | {"run": run, "ttfts_ms": ttfts} for run, ttfts in ((1, first), (2, last))]
    (one,) = compare(rows)
    assert [one.reduction, one.low, one.high] == pytest.approx([0.5] * 3), "each prompt with itself"
    rows[1]["errors"] = {"Server disconnected": 1}
    assert report(rows).endswith("mine, run 2: 1 of 100 requests failed: Server disconnected")


def test_the_server_keeps_an_idle_connection_longer_than_the_client():
    assert int(environment({})["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60
    assert environment({"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "7"})["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == "7"


def test_first_runs_are_compared_with_none_on_the_same_prompts():
    fields = {"dataset": "d", "model": "m", "num_prompts": 2, "request_rate": 1, "run": 1, "ttfts_ms": [1.0]}
    rows = [
        {"backend": name, "seed": seed, "mean_ttft_ms": base * ttft, "mean_tpot_ms": base * tpot, **fields}
        for seed, base in ((0, 10.0), (1, 20.0), (2, 15.0))
        for name, ttft, tpot in (("none", 1, 1), ("cache", 1 + seed / 100, 0.5))
    ]
    assert "| cache | 3 | +1.0% (+0.0% to +2.0%) | -50.0% (-50.0% to -50.0%) |" in report(rows)
    assert report(rows).count("backend") == 1
    assert report([row for row in rows if row["backend"] == "cache"]) == ""
    one_token = [row | {"mean_tpot_ms": 0.0} for row in rows]
    assert "| cache | 3 | +1.0% (+0.0% to +2.0%) |  |" in report(one_token)


@pytest.mark.slow  # imports vLLM's benchmarks
def test_prompts_are_those_that_vllm_samples(demo_model_path, tmp_path):
    from transformers import AutoTokenizer
    from vllm.benchmarks.datasets import ShareGPTDataset

    conversations = read_conversations(sharegpt_file())[:3000]
    assert len(read_conversations(sharegpt_file())) == 17671
    path = tmp_path / "part.json"
    path.write_text(json.dumps(conversations))
    theirs = ShareGPTDataset(dataset_path=str(path), random_seed=7).sample(
        AutoTokenizer.from_pretrained(demo_model_path), 100, no_oversample=True
    )
    made = make_workload("sharegpt", tmp_path, tokenizer=demo_model_path, path=str(path), num_prompts=100, seed=7)
    assert "--disable-shuffle" in made.args
    sent = ShareGPTDataset(dataset_path=made.args[3], random_seed=7, disable_shuffle=True).sample(
        AutoTokenizer.from_pretrained(demo_model_path), 100, no_oversample=True
    )
    assert sent == theirs
    ours = sample(conversations, encoder(demo_model_path), 100, seed=7)
    assert [(one.prompt, len(one.token_ids), one.num_output_tokens) for one in ours] == [
        (one.prompt, one.prompt_len, one.expected_output_len) for one in theirs
    ]


def test_a_cut_off_file_reads_up_to_the_cut_and_prompts_are_never_repeated(demo_model_path, tmp_path):
    conversations = read_conversations(sharegpt_file())[:12]
    whole = json.dumps(conversations)
    (tmp_path / "cut.json").write_text(whole[: whole.rindex('"id"') + 3])
    found = read_conversations(tmp_path / "cut.json")
    assert found == conversations[:-1]
    assert len(sample(found, encoder(demo_model_path), 100)) <= len(found)
    (tmp_path / "no.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="must be a JSON list"):
        read_conversations(tmp_path / "no.json")


def one_line(error: KVLabError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_a_missing_dataset_a_wrong_backend_and_a_port_in_use(demo_model_path, tmp_path):
    with pytest.raises(ConfigError, match="does not exist") as missing:
        run("none", model=demo_model_path, dataset_path=str(tmp_path / "none.json"))
    one_line(missing.value)
    with pytest.raises(ConfigError, match="must be one of"):
        run("lmcache-gpu", model=demo_model_path)
    with pytest.raises(ConfigError, match="unknown connector setting"):
        run("kvlab-memory", model=demo_model_path, settings={"chunk": 1})
    with pytest.raises(ConfigError, match="dataset must be one of"):
        run("none", model=demo_model_path, dataset=["sharegpt", "books"])
    with pytest.raises(ConfigError, match="one for each of 1 datasets"):
        run("none", model=demo_model_path, num_prompts=[1, 2])
    with pytest.raises(ConfigError, match="not among the backends"):
        run("none", model=demo_model_path, backend_flags={"vllm-prefix": []})
    with pytest.raises(ConfigError, match="cannot share a port"):
        run(["none", "kvlab-memory"], model=demo_model_path, together=True, port=8000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use") as used, Server(demo_model_path, port=port):
            pass
    one_line(used.value)


def test_a_server_that_dies_at_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    small = [*SERVER, "--kv-cache-memory-bytes", str(1 << 20)]  # not even one prompt fits
    with (
        pytest.raises(KVLabError, match="memory too small") as died,
        Server(short_demo(), small, env=ONE_PROCESS, log=tmp_path / "log"),
    ):
        pass
    one_line(died.value)
    with (
        pytest.raises(KVLabError, match="no-such-model") as wrong,
        Server(str(tmp_path / "no-such-model"), SERVER, log=tmp_path / "log2"),
    ):
        pass
    one_line(wrong.value)
    assert marked(str(tmp_path)) == []
