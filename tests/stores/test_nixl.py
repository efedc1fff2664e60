"""NIXL's POSIX plugin under a folder: the suite of all stores, its own faults, and what is refused."""

import os
import subprocess
import sys
import threading
import time

import pytest

from kvlab.connectors.config import vllm_config
from kvlab.errors import ConfigError, StoreError
from kvlab.machine.servers import make_importable
from kvlab.stores import check_url, open_store
from kvlab.stores.nixl import transfer
from kvlab.stores.spec import TierSpec
from kvlab.testing import StoreTests
from kvlab.testing.machines import pattern

make_importable("nixl", "nixl_cu12")


class TestNixlStore(StoreTests):
    persistent = True
    examples = 15

    def open(self, where, max_bytes):
        return open_store(f"nixl://{where}?size={max_bytes}")


class TestNixlThroughThePageCache(TestNixlStore):
    examples = 5

    def open(self, where, max_bytes):
        return open_store(f"nixl://{where}?size={max_bytes}&direct=false")


def test_a_folder_is_one_of_file_too(tmp_path):
    with open_store(f"nixl://{tmp_path}/kv?size=1MiB") as ours, open_store(f"file://{tmp_path}/kv?size=1MiB") as theirs:
        for size in (0, 1, 4096, 50_001):
            assert ours.put(f"a{size}", pattern(size))
            assert theirs.put(f"b{size}", pattern(size))
            assert bytes(theirs.get(f"a{size}")) == bytes(ours.get(f"b{size}")) == pattern(size)
        assert ours.stats()["plugin"] == "POSIX"


def test_a_file_that_was_cut_is_a_miss(tmp_path):
    with open_store(f"nixl://{tmp_path}/kv?size=1MiB") as store:
        store.put("k", pattern(50_000))
        file = next(path for path in (tmp_path / "kv").rglob("*") if path.is_file() and path.stat().st_size == 50_000)
        opened = store._open

        def cut(*args, **options):
            found = opened(*args, **options)
            os.truncate(file, 10_000)
            return found

        store._open = cut
        assert store.get("k") is None


def test_a_full_disk_is_told_from_other_failures(tmp_path, monkeypatch):
    """NIXL has one error for all of them."""
    with open_store(f"nixl://{tmp_path}/kv?size=1MiB") as store:
        store.put("k", pattern(9000))

        def fail(*args):
            raise StoreError("NIXL_ERR_BACKEND", reason="backend")

        monkeypatch.setattr(store._transfers, "run", fail)
        with pytest.raises(StoreError) as caught:
            store.get("k")
        assert caught.value.reason == "backend"
        full = os.statvfs_result((4096, 4096, 100, 0, 0, 10, 10, 10, 0, 255))
        monkeypatch.setattr(os, "fstatvfs", lambda fd: full)
        with pytest.raises(StoreError) as caught:
            store.put("l", pattern(9000))
        assert caught.value.reason == "enospc"
        assert store.stats()["error_backend"] == store.stats()["error_enospc"] == 1
        assert store.counters.errors == 2
        assert list(store.keys()) == ["k"]


def test_a_transfer_of_a_bad_descriptor_fails(tmp_path):
    with open_store(f"nixl://{tmp_path}/kv?size=1MiB") as store:
        read_only = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
        with pytest.raises(StoreError) as caught:
            store._transfers.run("WRITE", store._transfers.room(4096), read_only)
        assert caught.value.reason == "backend"
        with pytest.raises(StoreError):
            store._transfers.run("READ", store._transfers.room(4096), read_only)
        os.close(read_only)


def test_a_late_transfer_ends_for_its_caller_and_keeps_its_memory(tmp_path, monkeypatch):
    gate = threading.Event()
    ended = transfer._Transfer.ended
    monkeypatch.setattr(transfer._Transfer, "ended", lambda self: gate.is_set() and ended(self))
    with open_store(f"nixl://{tmp_path}/kv?size=1MiB&timeout_ms=50") as store:
        for index in range(transfer.MOST_LATE):
            with pytest.raises(StoreError) as caught:
                store.put(f"k{index}", pattern(9000))
            assert caught.value.reason == "timeout"
        start = time.monotonic()
        with pytest.raises(StoreError, match="hang already"):
            store.put("l", pattern(9000))
        assert time.monotonic() - start < 30
        assert store.stats()["error_timeout"] == transfer.MOST_LATE + 1
        assert len({id(late._memory.obj) for late in store._transfers._late}) == transfer.MOST_LATE
        gate.set()
        assert store.put("k", pattern(9000))
        assert store._transfers._late == []
        assert list(store.keys()) == ["k"], "what was late is not published"


def test_what_cannot_be_had_here_is_one_line(tmp_path):
    for url, words in {
        f"nixl://{tmp_path}/kv?plugin=GDS": "libcuda",
        f"nixl://{tmp_path}/kv?plugin=GDS_MT": "libcuda",
    }.items():
        check_url(url)
        with pytest.raises(ConfigError, match=words) as caught:
            open_store(url)
        assert "\n" not in str(caught.value)
    for url, words in {
        f"nixl://{tmp_path}?plugin=OBJ": "use s3://",
        f"nixl://{tmp_path}?plugin=X": "plugin must be",
        "nixl://host/kv": "three slashes",
        f"gds://{tmp_path}/kv": "cannot be opened: .*nixl:///path.plugin=GDS",
    }.items():
        for check in (open_store, check_url):
            with pytest.raises(ConfigError, match=words):
                check(url)


def test_a_missing_library_is_one_line():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('nixl', 'nixl_cu12', 'nixl_cu13')))\n"
        "from kvlab.stores import open_store\n"
        "try: open_store('nixl:///tmp/none')\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.count("\n") == 1
    assert "kvlab[nixl]" in out.stdout


def test_a_url_is_known_wherever_tiers_are():
    url = "nixl:///kv?size=1GiB&plugin=POSIX&timeout_ms=500"
    assert vllm_config(["memory://?size=1GiB", url])["kv_connector_extra_config"]["tiers"][1] == url
    assert TierSpec.parse(url + "&gb_per_s=10").size_bytes == 1 << 30
