"""Tiers under a real engine that others use too, or that fail: a real Redis server, two processes, metrics."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvlab.machine.redis_server import RedisServer
from tests.connectors.engine import connector, drain, empty_memory, engine, generate, prompt
from tests.connectors.models import TOKEN_BYTES

OTHER = """
from tests.connectors.engine import engine, generate, prompt
for url in {urls}:
    with engine([url]) as llm:
        for length in (300, 480):
            answer = generate(llm, [prompt(length)])[0]
            print("answer", answer.hit, *answer.tokens)
"""


def url_of(server: RedisServer) -> str:
    """The server as a tier that may take its time, as a busy machine does."""
    return f"{server.url}?timeout_ms=60000"


def another_process(*urls: str) -> list[tuple[int, list[int]]]:
    """For each tier hit and tokens of `prompt(300)` and `prompt(480)`, in an engine of another process."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", OTHER.format(urls=list(urls))]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    out = subprocess.run(command, timeout=250, env=env, cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-6000:]
    answers = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("answer ")]
    return [(int(hit), [int(token) for token in tokens]) for hit, *tokens in answers]


@pytest.fixture
def redis():
    with RedisServer() as server:
        yield server


def test_two_processes_share_one_redis_and_one_folder(redis, tmp_path, expected):
    """Each finds what the other stored."""
    urls, p, longer = [url_of(redis), f"file://{tmp_path}?size=1GiB"], prompt(300), prompt(480)
    for url in urls:
        with engine([url]) as llm:
            answer = generate(llm, [p])[0]
            assert (answer.hit, answer.tokens) == (0, expected(p))
    assert another_process(*urls) == [(299, expected(p)), (288, expected(longer))] * 2
    for url in urls:
        with engine([url]) as llm:
            answer = generate(llm, [longer])[0]
            assert (answer.hit, answer.tokens) == (479, expected(longer))


def test_a_redis_that_dies_and_returns_costs_misses_only(redis, expected):
    url = url_of(redis)
    p = prompt(300)
    with engine([url]) as llm:
        generate(llm, [p])
        drain(llm)
        assert generate(llm, [p])[0].hit == 299
        redis.kill()
        for q in (p, prompt(480), p):
            assert generate(llm, [q])[0].tokens == expected(q)
        redis.start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            answer = generate(llm, [p])[0]
            assert answer.tokens == expected(p)
            drain(llm)
            if answer.hit:
                break
        assert answer.hit == 299, "the tier comes back by itself"
        assert not connector(llm).hook_errors


def test_metrics_and_hit_sources(tmp_path, expected):
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    tiers = ["memory://?size=512MiB", f"file://{tmp_path}?size=1GiB"]
    with engine(tiers, {"disable_log_stats": False}) as llm:
        ours, seen = connector(llm), []
        original = ours.get_external_cache_hit_sources
        ours.get_external_cache_hit_sources = lambda r, n: seen.append(original(r, n)) or seen[-1]
        generate(llm, [prompt(300)])
        drain(llm)
        generate(llm, [prompt(300)])
        empty_memory(llm)
        generate(llm, [prompt(300)])
        assert seen == [{CacheHitSource.HOST: 299}, {CacheHitSource.DISK: 299}]
        told = {sample.name: 0.0 for metric in REGISTRY.collect() for sample in metric.samples}
        for sample in (sample for metric in REGISTRY.collect() for sample in metric.samples):
            told[sample.name] += sample.value
        assert told["vllm:kvlab_hit_tokens_total"] == 598
        assert told["vllm:kvlab_hit_requests_total"] == 2
        assert told["vllm:kvlab_loaded_bytes_total"] == 2 * 320 * TOKEN_BYTES  # whole pages
        assert told["vllm:kvlab_load_seconds_sum"] > 0
        assert told["vllm:kvlab_misses_total"] == 1
        stats = type(ours).build_kv_connector_stats(dict(ours.scheduler.counters))
        assert stats.reduce()["load_gb_per_s"] > 0
