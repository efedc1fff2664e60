"""What the GPU benchmarks read from a profiler's trace; the traces here are made up."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def span(name, cat, start, end, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, "args": args}


def test_a_transfer_is_taken_apart():
    from gpu_transfer_profile import CALL, parts

    load = [(20, 120), (123, 223)]  # two copies, each followed by its scatter
    trace = [{"ph": "M", "name": "process_name"}]
    for start in (1000, 0):
        trace += [span(CALL, "user_annotation", start, start + 50), span(CALL, "gpu_user_annotation", start, start + 9)]
        trace += [span("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", start + a, start + b) for a, b in load]
        trace += [span("_move", "kernel", start + b + 1, start + b + 6) for _, b in load]
    assert parts(trace, "HtoD") == [{"pieces": 2, "head": 20, "copies": 200, "gaps": 3, "tail": 6}] * 2


def test_a_request_is_taken_apart():
    from gpu_ttft_profile import REQUEST, life

    trace = [
        span(REQUEST, "user_annotation", 1000, 31000),
        span("start_load_kv", "user_annotation", 4000, 5500),
        span("get_finished", "user_annotation", 30000, 30100),
        span("get_finished", "user_annotation", 30200, 30400),
        span("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 4100, 4400, bytes=16 << 20),
        span("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 4402, 4702, bytes=16 << 20),
        span("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 2000, 2001, bytes=64),
        span("_move", "kernel", 4703, 4713),
        span("gemm", "kernel", 4713, 29713),
    ]
    found = {what: tuple(round(value, 3) for value in values) for what, values in life(trace).items()}
    assert found == {
        REQUEST: (0, 30, 30),
        "start_load_kv": (3, 4.5, 1.5),
        "get_finished": (29, 29.4, 0.3),
        "copies to the GPU": (3.1, 3.702, 0.6),
        "kernels": (3.703, 28.713, 25.01),
    }
