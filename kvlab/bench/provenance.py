"""Where a measured number comes from: machine, versions, commit, command. Goes into every row of data/measured/."""

import csv
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvlab.stores.url import hide_logins


def provenance(packages: Sequence[str] = ()) -> dict[str, str]:
    """Columns that every row of one run shares."""
    versions = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} absent")
    script = Path(sys.argv[0]).name
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_model(),
        "gpu": _gpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "versions": "; ".join(versions),
        "commit": _commit(),
        "command": hide_logins(shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write `rows` as CSV, columns in the order they first appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_rows(
    path: Path, rows: Sequence[Mapping[str, object]], *, packages: Sequence[str] = ("torch", "vllm")
) -> None:
    """Add `rows` of this run, with their provenance, to the CSV at `path`."""
    before: list[Mapping[str, object]] = []
    if path.exists():
        with open(path, newline="") as file:
            before = [dict(row) for row in csv.DictReader(file)]
    shared = provenance(packages)
    write_rows(path, [*before, *({**row, **shared} for row in rows)])


def _gpu_name() -> str:
    torch = sys.modules.get("torch")  # never imported for this
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else ""


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown"
    )


def _commit() -> str:
    if "KVLAB_COMMIT" in os.environ:  # a copy of the tree without its history
        return os.environ["KVLAB_COMMIT"]
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
