"""A server that is told to end writes back what it saved, within ``--shutdown-timeout``."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

import kvlab
from kvlab.container import unpack
from kvlab.serving.quality import quality
from kvlab.serving.server import Server
from kvlab.serving.warm import Warmed, warm
from kvlab.stores import open_store
from tests.connectors.engine import PATIENT
from tests.connectors.models import short_demo
from tests.support.serving import SERVER

NUM_PROMPTS = 6


@pytest.mark.timeout(900)
def test_sigterm_writes_back_what_waits(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    url = f"file://{tmp_path}/kv?size=1GiB"
    config = kvlab.vllm_config(["memory://?size=256MiB", url], chunk_tokens=64, report=True, **PATIENT)
    flags = [
        *SERVER,
        "--no-enable-prefix-caching",
        "--shutdown-timeout",
        "120",
        "--kv-transfer-config",
        json.dumps(config),
    ]
    rng = random.Random(1)
    with Server(short_demo(), flags, log=tmp_path / "log") as server:
        prompts = [[rng.randrange(1000, 40_000) for _ in range(300)] for _ in range(NUM_PROMPTS)]
        url_of_server = f"http://127.0.0.1:{server.port}"
        first = warm(prompts[:2], url=url_of_server, pin=True, concurrency=1)
        assert first == [Warmed(300, 0, 6)] * 2
        again = warm(prompts, url=url_of_server, concurrency=1)
        assert again == [Warmed(300, 299, None)] * 2 + [Warmed(300, 0, None)] * 4
        for prompt in (prompts[2], [{"role": "user", "content": "What is a cache? " * 30}]):
            (same,) = quality([prompt], url=url_of_server, greedy=4)
            assert same.hit_tokens == same.prompt_tokens - 1 > 100
            assert same.same_first, "nothing is lost here"
            assert same.kl < 1e-3 < same.agreement
        os.kill(server.session, signal.SIGTERM)
        os.waitid(os.P_PID, server.session, os.WEXITED | os.WNOWAIT)
    log = Path(tmp_path / "log").read_text()
    assert "kvlab: memory tier of 256 MiB" in log
    assert "disk holds 0 B of 1 GiB; 0 objects of namespace kvlab:" in log
    with open_store(url) as store:
        keys = list(store.keys())
        assert len(keys) > 6 * NUM_PROMPTS, "of each prompt four chunks of 64, a tail and a partial block; and others"
        for key in keys:
            unpack(store.get(key), key)
