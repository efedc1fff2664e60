"""Every byte of every file counts, a second look reads nothing, and a cache that cannot be trusted is not."""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import fingerprint
from kvlab.errors import ConfigError
from kvlab.fingerprint import WEIGHT_SUFFIXES, all_files, files_fingerprint, weight_files
from kvlab.serde import tables

OLD_NS = 10**18  # 2001: long past any racy window
EXT = 0xEF53


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "kvlab" / "fingerprints"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock far from the times of the files written here, so that digests are kept."""
    now = time.time_ns() + 100 * fingerprint.RACY_NS
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: now)
    monkeypatch.setattr(fingerprint, "file_system", lambda _path: EXT, raising=False)  # wherever tests run


def model(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def rewrite(file: Path, content: bytes, *, mtime_ns: int | None = None, replace: bool = False) -> None:
    """Write `content`, in a later tick of the file system's clock than the last change."""
    before = file.stat().st_ctime_ns
    while True:
        target = file.with_name("new") if replace else file
        target.write_bytes(content)
        os.replace(target, file)
        if mtime_ns is not None:
            os.utime(file, ns=(mtime_ns, mtime_ns))
        if file.stat().st_ctime_ns != before:
            return


def digest(folder: Path, *, fast: bool = False) -> str:
    return files_fingerprint(weight_files(folder), root=folder, fast=fast).digest


@settings(max_examples=60)
@given(
    size=st.integers(1, 5000),
    position=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    seed=st.binary(),
    fast=st.booleans(),
)
def test_any_byte_changed_is_another_digest(
    tmp_path_factory: pytest.TempPathFactory, size: int, position: float, flip: int, seed: bytes, fast: bool
) -> None:
    """With pieces of 1,024 bytes, read 256 at a time, so that every boundary is crossed."""
    folder = tmp_path_factory.mktemp("model")
    content = bytearray((seed * size + bytes(size))[:size])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "PIECE_BYTES", 1024)
        patch.setattr(fingerprint, "_READ_BYTES", 256)
        before = digest(model(folder, w__safetensors=bytes(content)), fast=fast)
        content[int(position * size)] ^= flip
        assert digest(model(folder, w__safetensors=bytes(content)), fast=fast) != before


@pytest.mark.parametrize("fast", [False, True])
def test_each_byte_of_a_file_of_several_pieces_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(fingerprint, "PIECE_BYTES", 64)
    content = os.urandom(200)
    seen = {digest(model(tmp_path, w__bin=content), fast=fast)}
    for position in range(len(content)):
        edited = bytearray(content)
        edited[position] ^= 1
        seen.add(digest(model(tmp_path, w__bin=bytes(edited)), fast=fast))
    assert len(seen) == 201


@pytest.mark.parametrize("suffix", [*sorted(WEIGHT_SUFFIXES), ".SAFETENSORS"])
def test_each_kind_of_file_counts_wherever_it_lies(tmp_path: Path, suffix: str) -> None:
    folder = model(tmp_path / "m", model__safetensors=b"x")
    seen = {digest(folder)}
    for place in (folder, folder / "sub" / "deeper"):
        place.mkdir(parents=True, exist_ok=True)
        for content in (b"", b"a", b"b"):
            (place / f"other{suffix}").write_bytes(content)
            seen.add(digest(folder))
    assert len(seen) == 7


def test_code_and_quantization_settings_count_and_notes_do_not(tmp_path: Path) -> None:
    folder = model(tmp_path, model__safetensors=b"x")
    before = digest(folder)
    model(folder, README__md=b"hello", tokenizer__json=b"{}", config__json=b"{}")
    (folder / tables.FILE).write_bytes(b"tables made from this model")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "part.bin").write_bytes(b"half a download")
    assert digest(folder) == before
    seen = {before}
    index = "model.safetensors.index.json"  # which of the files are read
    for name in ("modeling_x.py", "hf_quant_config.json", index, "kvlab-merge.safetensors"):
        (folder / name).write_bytes(b"{}")
        seen.add(digest(folder))
    assert len(seen) == 5


def test_what_is_in_which_file_counts(tmp_path: Path) -> None:
    """Names, sizes and contents cannot be shifted into one another."""
    folders = [
        model(tmp_path / "0", a__bin=b"12", b__bin=b"3"),
        model(tmp_path / "1", a__bin=b"1", b__bin=b"23"),
        model(tmp_path / "2", a__bin=b"3", b__bin=b"12"),
        model(tmp_path / "3", a__bin=b"123"),
        model(tmp_path / "4", a__bin=b"12", c__bin=b"3"),
        model(tmp_path / "5", a__bin=b"12", b__bin=b"3", c__bin=b""),
    ]
    assert len({digest(folder) for folder in folders}) == len(folders)


def test_the_same_content_elsewhere_is_the_same_model(tmp_path: Path) -> None:
    """Also behind links, as a hub cache has them, and in another process."""
    first = model(tmp_path / "first", a__safetensors=b"1" * 100, b__safetensors=b"2" * 100)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in first.iterdir():
        (linked / file.name).symlink_to(file)
    assert digest(first) == digest(linked)
    code = (
        "import sys; from pathlib import Path; from kvlab.fingerprint import files_fingerprint, weight_files\n"
        "root = Path(sys.argv[1]); print(files_fingerprint(weight_files(root), root=root).digest)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, str(linked)], capture_output=True, text=True, check=True, timeout=60
    )
    assert other.stdout.strip() == digest(first)


@pytest.mark.parametrize(
    ("fast", "known"),
    [
        (False, "eea9562c3b9bad8ac7e943d6984b709427886186f591b379a13b263df6a388ee"),
        (True, "f507428860f4bf92af61ca0ab6d9100dc8c1f477658848a572bbd40f4e3d201a"),
    ],
)
def test_a_known_digest(tmp_path: Path, fast: bool, known: str) -> None:
    """A change of the format must be deliberate: it is a new number in FORMATS."""
    folder = model(tmp_path, a__safetensors=b"abc", b__bin=b"")
    assert digest(folder, fast=fast) == known


@pytest.mark.usefixtures("later")
def test_the_two_digests_are_kept_apart(tmp_path: Path) -> None:
    folder = model(tmp_path, a__safetensors=b"abc")
    assert digest(folder) != digest(folder, fast=True)
    assert digest(folder) != digest(folder, fast=True)  # both from the cache now
    for fast in (False, True):
        assert files_fingerprint(weight_files(folder), fast=fast).num_read_bytes == 0


def test_gguf_shards_and_projector_belong_to_the_file(tmp_path: Path) -> None:
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "n-00001-of-00002.gguf", "m.gguf", "mmproj-m.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    assert [file.name for file in weight_files(tmp_path / names[0])] == [names[0], names[1], names[4]]
    assert [file.name for file in weight_files(tmp_path / "m.gguf")] == ["m.gguf", "mmproj-m.gguf"]


def test_a_link_that_leads_back_ends(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", a__bin=b"1")
    (folder / "again").symlink_to(folder)
    assert [file.name for file in all_files(folder)] == ["a.bin"]


@pytest.mark.usefixtures("later")
def test_a_second_look_reads_nothing(tmp_path: Path, cache: Path) -> None:
    folder = model(tmp_path, a__safetensors=b"1" * 1000, b__safetensors=b"2" * 500)
    first = files_fingerprint(weight_files(folder), root=folder)
    second = files_fingerprint(weight_files(folder), root=folder)
    assert (first.num_read_bytes, second.num_read_bytes, second.num_bytes) == (1500, 0, 1500)
    assert first.digest == second.digest
    assert {entry.stat().st_mode & 0o777 for entry in cache.iterdir()} == {0o600}
    assert cache.stat().st_mode & 0o777 == 0o700
    rewrite(folder / "b.safetensors", b"3" * 500)
    third = files_fingerprint(weight_files(folder), root=folder)
    assert third.num_read_bytes == 500
    assert third.digest != first.digest


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("replace", [False, True], ids=["in place", "replaced"])
def test_a_change_that_hides_size_and_mtime_is_seen(tmp_path: Path, replace: bool) -> None:
    """The time of the last change of the inode cannot be set back."""
    file = model(tmp_path, a__safetensors=b"1" * 100) / "a.safetensors"
    os.utime(file, ns=(OLD_NS, OLD_NS))
    before = digest(tmp_path)
    rewrite(file, b"2" * 100, mtime_ns=OLD_NS, replace=replace)
    assert file.stat().st_mtime_ns == OLD_NS
    assert digest(tmp_path) != before


def test_a_file_that_changed_just_now_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path, a__safetensors=b"1" * 100)
    changed_ns = files_fingerprint(weight_files(folder)).changed_ns
    monkeypatch.setattr(fingerprint, "file_system", lambda _path: EXT, raising=False)
    for age_ns, kept in ((-5, False), (0, False), (fingerprint.RACY_NS - 1, False), (fingerprint.RACY_NS, True)):
        monkeypatch.setattr(fingerprint.time, "time_ns", lambda now=changed_ns + age_ns: now)
        files_fingerprint(weight_files(folder))
        assert (files_fingerprint(weight_files(folder)).num_read_bytes == 0) is kept


def test_a_write_through_a_mapping_is_seen_where_it_changes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmpfs takes writes to a shared mapping without a change of the file's times."""
    now = time.time_ns() + 100 * fingerprint.RACY_NS
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: now)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = model(Path(folder), a__safetensors=b"1" * 8192) / "a.safetensors"
        with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
            mapped[0:1] = b"2"
            before, state = digest(Path(folder)), file.stat()
            mapped[1:2] = b"3"  # of a page that no write to a disk makes clean
            assert (file.stat().st_mtime_ns, file.stat().st_ctime_ns) == (state.st_mtime_ns, state.st_ctime_ns)
            assert digest(Path(folder)) != before


KINDS = {
    "ext4": (EXT, True), "xfs": (0x58465342, True), "btrfs": (0x9123683E, True), "overlay": (0x794C7630, True),
    "tmpfs": (0x01021994, False), "ramfs": (0x858458F6, False), "hugetlbfs": (0x958458F6, False),
    "nfs": (0x6969, False), "9p": (0x01021997, False), "fuse": (0x65735546, False), "cifs": (0xFF534D42, False),
    "of a later kernel": (0x12345678, False), "unknown": (None, False),
}  # fmt: skip


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("kind", KINDS)
def test_digests_are_kept_only_for_file_systems_whose_times_can_be_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    magic, kept = KINDS[kind]
    folder = model(tmp_path, a__safetensors=b"1" * 100)
    digest(folder)  # an entry is there: it is not believed either
    monkeypatch.setattr(fingerprint, "file_system", lambda _path: magic)
    assert (files_fingerprint(weight_files(folder)).num_read_bytes == 0) is kept
    assert (files_fingerprint(weight_files(folder)).num_read_bytes == 0) is kept


def test_the_system_tells_which_file_system_it_is(tmp_path: Path) -> None:
    kinds = {"/proc": 0x9FA0, "/sys": 0x62656572, "/dev/shm": 0x01021994}
    assert {path: fingerprint.file_system(path) for path in kinds} == kinds
    said = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, text=True, check=True, timeout=60)
    assert fingerprint.file_system(str(tmp_path)) == int(said.stdout, 16)
    assert fingerprint.file_system(str(tmp_path / "absent")) is None


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "garbage", "foreign", "link", "folder"])
def test_a_damaged_or_foreign_entry_is_read_anew(tmp_path: Path, cache: Path, damage: str) -> None:
    folder = model(tmp_path / "m", a__safetensors=b"1" * 100)
    right = digest(folder)
    (entry,) = [file for file in cache.iterdir() if file.name != ".lock"]
    data = entry.read_bytes()
    wrong = data.replace(b'"digest": "', b'"digest": "0')
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        entry.unlink()
        entry.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        content = {"cut": data[:-1], "flipped": wrong, "empty": b"", "garbage": b"\xff\n[", "foreign": data}[damage]
        entry.write_bytes(content)
        entry.chmod(0o666 if damage == "foreign" else 0o600)
    again = files_fingerprint(weight_files(folder), root=folder)
    assert (again.digest, again.num_read_bytes) == (right, 100)


@pytest.mark.usefixtures("later")
def test_a_cache_that_others_can_write_to_is_not_used(tmp_path: Path, cache: Path) -> None:
    folder = model(tmp_path / "m", a__safetensors=b"1" * 100)
    digest(folder)
    cache.chmod(0o777)
    assert files_fingerprint(weight_files(folder)).num_read_bytes == 100
    cache.chmod(0o700)
    assert files_fingerprint(weight_files(folder)).num_read_bytes == 0


@pytest.mark.usefixtures("later")
def test_no_place_for_a_cache_costs_only_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "m", a__safetensors=b"1" * 100)
    right = digest(folder)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [files_fingerprint(weight_files(folder), root=folder).num_read_bytes for _ in range(2)] == [100, 100]
    assert digest(folder) == right


@pytest.mark.usefixtures("later")
def test_writers_at_once_agree_and_leave_one_entry_a_file(tmp_path: Path, cache: Path) -> None:
    folder = model(tmp_path, **{f"{i}__bin": bytes([i]) * 1000 for i in range(8)})
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(digest(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    entries = [file for file in cache.iterdir() if file.name != ".lock"]
    assert len(entries) == 8
    for entry in entries:
        json.loads(entry.read_bytes().partition(b"\n")[2])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model(tmp_path, a__safetensors=b"1" * 100) / "a.safetensors"
    read = os.preadv

    def and_change(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        got = read(descriptor, buffers, offset)
        file.write_bytes(b"2" * 101)
        return got

    monkeypatch.setattr(fingerprint.os, "preadv", and_change)
    with pytest.raises(ConfigError, match=r"a\.safetensors changed while it was read"):
        digest(tmp_path)


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", a__safetensors=b"1")
    (folder / "b.safetensors").symlink_to(folder / "gone")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "w.bin")
    for path, words in (
        (folder, "cannot read .*b.safetensors: No such file"),
        (tmp_path / "absent", "cannot read .*absent: No such file"),
        (tmp_path / "pipes", "is not a regular file"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            digest(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no file to fingerprint"):
        files_fingerprint([])
