"""Where a measured number comes from: machine, versions, commit, command. Goes into every row of data/measured/."""

import csv
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvlab.stores.url import hide_logins
from kvlab.system import num_cores


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
        "gpu": gpu_name(),
        "cores": str(num_cores()),
        "kernel": platform.release(),
        "versions": "; ".join(versions),
        "commit": _commit(),
        "command": hide_logins(shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]])),
    }


@functools.cache
def gpu_name() -> str:
    """Name of the first NVIDIA GPU, empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def filesystem(path: Path) -> str:
    """Type of the file system that `path` lies on, such as ext4, overlay or tmpfs, which is memory."""
    best, kind = "", "unknown"
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        _, mount, name, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, name
    return kind


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
