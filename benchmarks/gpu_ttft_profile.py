"""Where does the time of a hit go? A request's life in milliseconds, on the host and on the GPU.

    python benchmarks/gpu_ttft_profile.py MODEL --backends kvlab [--rows data/measured/gpu_ttft_profile.csv]

Requests as in gpu_ttft.py, under torch's profiler, which slows the host down: read the shares, not the sums. Rows:
each hook of the connector (when it began, counted from the request's beginning, and how long all its calls took), the
copies to the GPU of more than 64 KiB (first begins, last ends, sum), and the last kernel. Medians of `--repeats`.
"""

import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

from gpu_ttft import arguments, prompt, start
from torch.profiler import ProfilerActivity, profile, record_function

from kvlab.machine.provenance import append_rows

REQUEST = "request"
HOOKS = (
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_finished",
    "update_connector_output",
)
LARGE = 64 << 10


def watch(connector) -> None:
    """Every call of a hook becomes a span of the profile."""
    for name in HOOKS:
        hook = getattr(connector, name)

        @functools.wraps(hook)
        def spanned(*args, _hook=hook, _name=name, **kwargs):
            with record_function(_name):
                return _hook(*args, **kwargs)

        setattr(connector, name, spanned)


def life(trace: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Of a Chrome trace of one request: what -> (began, ended, sum of durations), in ms since it began."""
    spans = [(e["name"], e["cat"], e["ts"], e["ts"] + e["dur"], e.get("args", {})) for e in trace if e.get("ph") == "X"]
    begin, end = next((b, e) for name, cat, b, e, _ in spans if name == REQUEST and cat == "user_annotation")
    groups: dict[str, list[tuple[float, float]]] = {REQUEST: [(begin, end)]}
    for name, cat, at, until, args in spans:
        if cat == "user_annotation" and name in HOOKS:
            groups.setdefault(name, []).append((at, until))
        elif cat == "gpu_memcpy" and "HtoD" in name and args.get("bytes", 0) > LARGE:
            groups.setdefault("copies to the GPU", []).append((at, until))
        elif cat == "kernel":
            groups.setdefault("kernels", []).append((at, until))
    return {
        what: (
            (min(at for at, _ in found) - begin) / 1e3,
            (max(until for _, until in found) - begin) / 1e3,
            sum(until - at for at, until in found) / 1e3,
        )
        for what, found in groups.items()
    }


def main() -> None:
    options = arguments("gpu_ttft_profile.csv", 10, "kvlab")
    if len(options.backends) != 1:
        raise SystemExit(f"--backends must name one backend to profile, got {','.join(options.backends)}")
    backend = options.backends[0]
    llm = start(options, backend)
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if has_kv_transfer_group():
        watch(get_kv_transfer_group())
        watch(llm.llm_engine.engine_core.engine_core.scheduler.connector)
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)

    def ask(ids: list[int]) -> None:
        if backend == "vllm-offload":
            llm.reset_prefix_cache()
        with record_function(REQUEST):
            llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)

    rows = []
    for length in options.lengths:
        ids = prompt(length, 0)
        for _ in range(4):
            ask(ids)
            time.sleep(0.5)
        lives = []
        for _ in range(options.repeats):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                ask(ids)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(path))
                lives.append(life(json.loads(path.read_text())["traceEvents"]))
        for what in lives[0]:
            began, ended, spent = (
                round(statistics.median(column), 3) for column in zip(*(each[what] for each in lives), strict=True)
            )
            row = {
                "backend": backend, "tokens": length, "graphs": options.graphs, "what": what,
                "began_ms": began, "ended_ms": ended, "spent_ms": spent, "repeats": options.repeats,
            }  # fmt: skip
            rows.append(row)
            print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    append_rows(options.rows, rows)


if __name__ == "__main__":
    main()
