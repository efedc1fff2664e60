"""A server that is started again between its runs: what its tier still holds, a second process finds."""

import pytest

from kvlab.serving import report, run
from tests.connectors.engine import PATIENT
from tests.connectors.models import short_demo
from tests.support.serving import ONE_PROCESS, SERVER, small_file


@pytest.mark.timeout(1200)
def test_what_outlives_the_server_is_hit_after_a_restart(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)  # a server chooses its own threads
    rows = run(
        "kvlab-serve",
        model=short_demo(),
        dataset_path=str(small_file(tmp_path)),
        num_prompts=4,
        request_rate=8,
        output_len=4,
        max_prompt_tokens=400,
        cache_size="256MiB",
        server_flags=SERVER,
        settings=PATIENT,
        env=ONE_PROCESS,
        warmups=0,
        restart=True,
        folder=tmp_path / "kept",
    )
    first, second = rows
    assert [(row["backend"], row["run"], row["restarted"]) for row in rows] == [
        ("kvlab-serve", 1, False),
        ("kvlab-serve", 2, True),
    ]
    assert second["completed"] == first["completed"] == 4
    assert second["same_texts"] == 1
    assert first["hit_tokens"] == 0
    assert second["hit_tokens"] == second["loaded_tokens"] > second["total_input_tokens"] // 2
    assert "kvlab-serve" in report(rows)
