"""The disk tier against the suite, and against what happens to folders."""

import errno
import itertools
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from kvlab.container import Part, pack, unpack
from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import aligned
from kvlab.stores import open_store
from kvlab.stores.disk import DiskStore
from kvlab.stores.disk.folder import Folder
from kvlab.stores.disk.names import path_of
from kvlab.testing import BudgetTests, StoreTests
from kvlab.testing.machines import pattern


def files_under(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.name != "journal"]


class TestDiskStore(StoreTests, BudgetTests):
    persistent = True
    examples = 30

    def open(self, where, max_bytes):
        return DiskStore(where, max_bytes)

    def on_medium(self, where, store):
        return sum(path.stat().st_size for path in files_under(where))


class TestBufferedDiskStore(StoreTests, BudgetTests):
    persistent = True
    examples = 10

    def open(self, where, max_bytes):
        return open_store(f"file://{where}?size={max_bytes}&direct=false&fsync=true")


@pytest.fixture
def store(tmp_path):
    with DiskStore(tmp_path / "kv", 1 << 20) as store:
        yield store


def a_container(key, seed=0, size=5000):
    data = np.frombuffer(pattern(size, seed), np.uint8)
    return pack(key, {"kv": Part("U8", (size,), memoryview(data))})


def test_a_file_opens_with_safetensors_and_is_its_owners_alone(store):
    key = "kvlab:org-Model:00aa:" + "0f" * 16
    assert store.put(key, a_container(key))
    path = store.root / path_of(key)
    assert path.name == key + ".safetensors"
    with safe_open(path, "numpy") as file:
        assert file.metadata()["key"] == key
        assert file.get_tensor("kv").tobytes() == pattern(5000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (store.root, path.parent, store.root / ".kvlab"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_aligned_buffers_go_straight_to_the_file(store):
    value = aligned(3 * 4096)
    value[:] = pattern(len(value))
    assert store.put("k", [pattern(4096, 1), value, b"tail"])
    room = aligned(5 * 4096)
    assert store.get_into("k", room) == 4 * 4096 + 4
    assert bytes(room[: 4 * 4096 + 4]) == pattern(4096, 1) + pattern(3 * 4096) + b"tail"


def test_nothing_is_written_outside_the_folder(tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    with DiskStore(tmp_path / "kv", 1 << 20) as store:
        for key in ["../before/x", "/etc/x", "..", "a/../../b", "\0", "~root/x"]:
            assert store.put(key, b"v")
            assert (store.root / path_of(key)).resolve().is_relative_to(store.root.resolve())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "kv"]
    assert list(before.iterdir()) == []


def test_a_folder_link_or_pipe_in_the_place_of_a_file_is_a_miss(store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"not for readers")
    for key, make in {
        "folder": lambda path: path.mkdir(),
        "link": lambda path: path.symlink_to(secret),
        "pipe": os.mkfifo,
    }.items():
        path = store.root / path_of(key)
        path.parent.mkdir(exist_ok=True)
        make(path)
        assert store.get(key) is None
        assert store.size_of(key) is None
        assert not store.contains(key)
        assert store.put(key, b"value")
        assert bytes(store.get(key)) == b"value"
    assert secret.read_bytes() == b"not for readers"


def test_a_sparse_file_of_a_terabyte_allocates_nothing(store):
    store.put("k", b"v")
    os.truncate(store.root / path_of("k"), 1 << 40)
    assert store.get("k") is None
    assert not store.contains("k")


def test_damaged_files_are_seen_by_the_container_and_set_aside(store):
    for damage in ("cut", "flip", "swap", "empty"):
        store.put("a", a_container("a"))
        store.put("b", a_container("b", seed=1))
        path = store.root / path_of("a")
        raw = bytearray(path.read_bytes())
        if damage == "flip":
            raw[-1] ^= 1
        path.write_bytes(
            {"cut": raw[:-100], "flip": raw, "swap": (store.root / path_of("b")).read_bytes(), "empty": b""}[damage]
        )
        with pytest.raises(ValueError):
            unpack(store.get("a"), "a")
        store.quarantine("a", damage)
        assert store.get("a") is None
        assert store.why_missing("a") == f"set_aside:{damage}"
        assert unpack(store.get("b"), "b").parts["kv"].nbytes == 5000


def test_files_set_aside_are_few_and_counted(tmp_path):
    with DiskStore(tmp_path / "kv", 100_000) as store:
        for index in range(20):
            store.put(f"k{index}", pattern(4000, index))
            store.quarantine(f"k{index}", "test")
        kept = list((store.root / ".kvlab" / "broken").iterdir())
        assert 0 < len(kept) <= 8
        assert store.used_bytes == 4000 * len(kept)
        assert store.put("large", pattern(99_000))
        assert store.used_bytes <= 100_000
        assert sum(path.stat().st_size for path in files_under(store.root)) <= 100_000


def test_scan_counts_what_is_there_and_drops_what_is_broken(tmp_path):
    root = tmp_path / "kv"
    with DiskStore(root, 1 << 20) as store:
        for key in ("good", "cut", "empty"):
            store.put(key, a_container(key))
        store.put("plain", b"no container at all")
    path = root / path_of("cut")
    path.write_bytes(path.read_bytes()[:-1])
    (root / path_of("empty")).write_bytes(b"")
    (root / ".kvlab" / "writing" / "0123456789abcdef").write_bytes(b"x" * 1000)
    (root / "mine.txt").write_bytes(b"not ours")
    (root / path_of("good")).with_name("also-not-ours.safetensors").write_bytes(b"foreign")
    with DiskStore(root, 1 << 20) as store:
        assert sorted(store.keys()) == ["good", "plain"]
        assert store.counters.dropped == 3
        assert store.used_bytes == (root / path_of("good")).stat().st_size + len(b"no container at all")
    assert (root / "mine.txt").read_bytes() == b"not ours"
    assert (root / path_of("good")).with_name("also-not-ours.safetensors").exists()
    assert list((root / ".kvlab" / "writing").iterdir()) == []


def test_a_smaller_budget_is_kept_from_the_start_and_the_last_used_stay(tmp_path):
    root = tmp_path / "kv"
    with DiskStore(root, 1 << 20) as store:
        for index in range(10):
            store.put(f"k{index}", pattern(10_000, index))
        store.get("k0")
    with DiskStore(root, 30_000) as store:
        assert store.used_bytes == 30_000
        assert sorted(store.keys()) == ["k0", "k8", "k9"]
    assert sum(path.stat().st_size for path in files_under(root)) == 30_000


def test_two_stores_on_one_folder_share_budget_and_content(tmp_path):
    root = tmp_path / "kv"
    with DiskStore(root, 100_000) as one, DiskStore(root, 100_000) as two:
        for index in range(20):
            (one if index % 2 else two).put(f"k{index}", pattern(9_000, index))
            assert sum(path.stat().st_size for path in files_under(root)) <= 100_000
        assert one.used_bytes == two.used_bytes == sum(path.stat().st_size for path in files_under(root))
        assert sorted(one.keys()) == sorted(two.keys())
        assert bytes(two.get("k19")) == bytes(one.get("k19")) == pattern(9_000, 19)
        one.delete("k19")
        assert two.get("k19") is None
        two.put("k19", pattern(10, 0))
        assert bytes(one.get("k19")) == pattern(10, 0)


def test_a_lookup_sees_what_another_process_did(tmp_path):
    with DiskStore(tmp_path / "kv", 1 << 20) as one, DiskStore(tmp_path / "kv", 1 << 20) as two:
        one.put("a", b"1")
        one.put("b", b"2")
        assert two.contains_many(["a", "b", "c"]) == [True, True, False]
        one.delete("a")
        assert two.contains_many(["a", "b", "c"]) == [False, True, False]
        with one._folder.index.locked():  # another process is at work: nobody waits for it
            assert two.contains_many(["a", "b", "c"]) == [False, True, False]


def test_stores_in_turns_count_the_folder_once_each(tmp_path, monkeypatch):
    scans: list[Folder] = []
    scan = Folder._scan
    monkeypatch.setattr(Folder, "_scan", lambda folder: scans.append(folder) or scan(folder))
    with DiskStore(tmp_path, 1 << 20) as one, DiskStore(tmp_path, 1 << 20) as two:
        for index in range(20):
            one.put(f"k{index}", bytes(100))
            assert two.contains_many([f"k{index}", "other"]) == [True, False]
            if index % 2:
                two.delete(f"k{index}")
                assert one.contains_many([f"k{index}"]) == [False]
        assert one.used_bytes == two.used_bytes == 1000
        assert scans == [one._folder, two._folder]


def test_a_journal_that_is_cut_off_is_begun_anew(tmp_path):
    with DiskStore(tmp_path, 1 << 20) as one, DiskStore(tmp_path, 1 << 20) as two:
        one.put("a", bytes(100))
        journal = tmp_path / ".kvlab" / "journal"
        first = journal.read_bytes()[:18]
        with journal.open("ab") as file:
            file.write(b"+ 7")  # of a writer that died over it
        with DiskStore(tmp_path, 1 << 20) as three:
            assert three.contains_many(["a"]) == two.contains_many(["a"]) == [True]
            assert one.put("b", bytes(50))
            assert [store.used_bytes for store in (one, two, three)] == [150] * 3
        assert journal.read_bytes()[:18] != first
        assert journal.read_bytes().endswith(b"\n")


def test_a_file_deleted_or_cut_behind_our_back_is_a_miss(store):
    store.put("k", pattern(5000))
    (store.root / path_of("k")).unlink()
    assert store.get("k") is None
    assert store.used_bytes == 0
    assert store.why_missing("k") == "vanished"


def test_a_folder_that_vanishes_is_made_again(store):
    import shutil

    store.put("k", b"v")
    shutil.rmtree(store.root)
    assert store.get("k") is None
    assert store.put("k", b"w")
    assert bytes(store.get("k")) == b"w"
    assert store.used_bytes == 1


def test_a_folder_that_is_moved_away_is_left_as_it_is(tmp_path):
    """It may be a backup."""
    with DiskStore(tmp_path / "kv", 100_000) as store:
        for key in "xy":
            store.put(key, bytes(40_000))
        (tmp_path / "kv").rename(tmp_path / "backup")
        before = sorted(path for path in (tmp_path / "backup").rglob("*") if path.is_file())
        for number in range(4):
            assert store.put(str(number), bytes(40_000))
        assert sorted(path for path in (tmp_path / "backup").rglob("*") if path.is_file()) == before
        assert store.get("x") is None
        assert bytes(store.get("3")) == bytes(40_000)
        assert store.used_bytes <= 100_000


def test_a_place_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot use"):
        DiskStore(tmp_path / "file" / "kv", 1000)
    with pytest.raises(ConfigError, match="absolute"):
        DiskStore("kv", 1000)
    with pytest.raises(ConfigError, match="three slashes"):
        open_store("file://data/kv")
    with pytest.raises(ConfigError, match="polcy"):
        open_store(f"file://{tmp_path}/kv?polcy=lru")


def test_an_unwritable_folder_raises_store_error_and_heals(store):
    store.put("k", pattern(5000))
    writing = store.root / ".kvlab" / "writing"
    writing.rmdir()
    writing.write_bytes(b"")
    with pytest.raises(StoreError, match="could not write"):
        store.put("other", b"v")
    assert bytes(store.get("k")) == pattern(5000)
    writing.unlink()
    assert store.put("other", b"v")
    assert store.counters.errors == 1


def test_a_full_disk_raises_store_error_and_leaves_nothing(tmp_path):
    """The kernel refuses bytes beyond a file size limit just as it does on a full disk."""
    code = """
        import resource, sys, signal
        from pathlib import Path
        from kvlab.errors import StoreError
        from kvlab.stores.disk import DiskStore
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with DiskStore(sys.argv[1], 1 << 20) as store:
            assert store.put("k", b"v" * 10_000)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            try:
                store.put("large", b"v" * 100_000)
            except StoreError as error:
                print("refused:", error)
                assert error.reason == "efbig", error.reason
            assert bytes(store.get("k")) == b"v" * 10_000
            assert not list((Path(sys.argv[1]) / ".kvlab/writing").iterdir())
            assert store.used_bytes == 10_000, store.used_bytes
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "kv")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "refused: could not write 100000 bytes" in done.stdout
    assert os.strerror(errno.EFBIG) in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def keys_that_meet():
    """A key whose file would be the folder that another key's file lies in, if folders were named like files."""
    short = "a" * 188
    longer = (f"{short}.safetensors{n}" for n in itertools.count())
    return short, next(key for key in longer if path_of(key)[:2] == path_of(short)[:2])


def test_no_key_lies_in_a_folder_that_is_another_keys_file(tmp_path):
    short, longer = keys_that_meet()
    with DiskStore(tmp_path / "kv", 1 << 20) as store:
        for _ in range(2):
            assert store.put(short, b"short")
            assert store.put(longer, b"longer")
            assert (bytes(store.get(short)), bytes(store.get(longer))) == (b"short", b"longer")


def test_folders_of_long_keys_go_with_the_last_file_in_them(tmp_path):
    keys = [f"{n:03}" + "k" * 900 for n in range(40)]
    with DiskStore(tmp_path / "kv", 64 << 10) as store:
        for key in keys:
            assert store.put(key, bytes(9_000))
        assert store.stats()["evictions"] > 20
        for key in keys:
            store.delete(key)
        assert not [path for path in (tmp_path / "kv").rglob("*%") if ".kvlab" not in path.parts]


@pytest.mark.parametrize("moved", [".kvlab", ".kvlab/journal"])
def test_a_journal_that_is_moved_away_leaves_one_budget(tmp_path, moved):
    root = tmp_path / "kv"
    with DiskStore(root, 64 << 10, direct=False) as one:
        assert one.put("a", bytes(30_000))
        (root / moved).rename(tmp_path / "away")
        with DiskStore(root, 64 << 10, direct=False) as other:
            for n in range(8):
                assert (one if n % 2 else other).put(f"k{n}", bytes(20_000))
            files = [path for path in root.rglob("*.safetensors") if ".kvlab" not in path.parts]
            assert sum(path.stat().st_size for path in files) <= 64 << 10
