"""Where a serving row comes from: `provenance`, and the GPU, vLLM's version, and what lies under a disk tier."""

import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvlab.bench.client import client_version
from kvlab.bench.provenance import provenance
from kvlab.stores.url import hide_logins


@functools.cache
def gpu_name() -> str:
    """Name of the first NVIDIA GPU, empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


@functools.cache
def origin() -> dict[str, Any]:
    """Columns that every row shares. $KVLAB_COMMIT names the commit of a copy that is no checkout."""
    shared: dict[str, Any] = dict(provenance(("torch", "transformers")))
    shared["versions"] += f"; vllm {client_version()}"
    shared["commit"] = os.environ.get("KVLAB_COMMIT", shared["commit"])
    if gpu_name():
        shared["gpu"] = gpu_name()
    by_hand = Path(sys.argv[0]).parent.name == "kvlab" or Path(sys.argv[0]).name == "kvlab"
    args = [
        arg.rpartition("/")[2] if arg.startswith("/") else arg for arg in sys.argv[1:]
    ]  # no folders of this machine
    shared["command"] = hide_logins(shlex.join(["kvlab", *args])) if by_hand else "kvlab.bench.run(...)"
    return shared


def filesystem(path: Path) -> str:
    """Type of the file system that `path` lies on, such as ext4, overlay or tmpfs, which is memory."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, name, *_ = line.split()
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, name
    return kind
