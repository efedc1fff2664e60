"""Servers of the benchmark's tests: their flags, a small dataset, and the processes that a test started."""

import json
import os
from pathlib import Path

from kvlab.datasets.sharegpt import read_conversations, sharegpt_file

BLOCK = 32
SERVER = ["--max-model-len", "1088", "--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(256 << 20)]
# Every CPU computes float32 fast; bfloat16 is slow where it is emulated.
SERVER += ["--max-num-seqs", "8", "--enforce-eager", "--dtype", "float32"]
# vLLM's worker in the engine's process, which imports vLLM once less.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
MARK = "KVLAB_TEST_MARK"


def small_file(folder: Path) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps(read_conversations(sharegpt_file())[:40]))
    return path


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def marked(value: str) -> list[int]:
    """Processes that carry the test's mark in their environment, this one left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and int(entry.name) != os.getpid()
                and f"{MARK}={value}".encode() in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
