"""Linux has what macOS and Windows lack; imitated by taking it away before kvlab is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MACOS = """
import os, sys
for name in ("O_DIRECT", "O_PATH", "sched_getaffinity", "memfd_create"):
    delattr(os, name)
"""
WINDOWS = (
    MACOS
    + """
import select
del os.register_at_fork, os.fork, select.poll
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ModuleNotFoundError("No module named 'fcntl'", name=name)
sys.modules.pop("fcntl", None)
sys.meta_path.insert(0, Hidden())
"""
)


def run(system: str, code: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", system + code], capture_output=True, text=True, timeout=120, env=env, cwd=cwd
    )


DISK = """
from kvlab import open_store
with open_store(f"file://{os.getcwd()}/kv?size=1MiB&check=false") as store:
    for size in (0, 1, 4096, 100_001):
        assert store.put(f"k{size}", bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    assert store.stats()["io"] == "buffered"
with open_store(f"file://{os.getcwd()}/kv?size=1MiB&check=false") as store:
    assert bytes(store.get("k100001")) == bytes(range(256)) * 390 + b"x" * 161
    assert sorted(store.keys()) == ["k0", "k1", "k100001", "k4096"]
"""
SIMULATION = """
import kvlab
from kvlab.machine.provenance import provenance
rows = kvlab.sweep("chat", ["9 blocks", "8 blocks"], ["lru"], progress=False)
assert len(rows) == 2
assert int(provenance()["cores"]) == os.cpu_count()
assert kvlab.size_calculator("Qwen2.5-7B").at(1)
with kvlab.open_store("memory://?size=1MiB") as store:
    assert store.put("k", b"v")
"""


@pytest.mark.parametrize(
    ("system", "code"), [(MACOS, DISK), (MACOS, SIMULATION), (WINDOWS, SIMULATION)], ids=["disk", "macos", "windows"]
)
def test_it_works_without(system, code, tmp_path):
    done = run(system, code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_disk_store_on_windows_is_one_line(tmp_path):
    command = "from kvlab.__main__ import main; sys.exit(main(['store', 'ls', sys.argv[1]]))"
    (tmp_path / ".kvlab").mkdir()
    code = f"sys.argv = ['', 'file://{tmp_path}']\n{command}"
    done = run(WINDOWS, code, tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("kvlab store: file:// needs Linux or macOS, whose files can be locked; on Windows use WSL\n")
