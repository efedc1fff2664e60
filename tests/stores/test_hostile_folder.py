"""A folder that another program or user prepared: nothing outside it is read, written or removed."""

import os
import stat
from contextlib import suppress

import pytest

from kvlab.cli.store import main
from kvlab.errors import ConfigError, StoreError
from kvlab.stores import open_store
from kvlab.stores.disk import DiskStore
from kvlab.stores.disk.names import is_own, path_of
from kvlab.testing.machines import ODD_KEYS, pattern

EPOCH = "# 0123456789abcde\n"
OTHER = 12345  # a user id that is not ours


@pytest.fixture
def outside(tmp_path):
    """Files that belong to others, and a check that they are as they were."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    for name in ("thesis.txt", "0123456789abcdef", "01234567-notes"):
        (folder / name).write_bytes(b"years of work\n" * 1000)
    before = {path.name: (path.read_bytes(), path.stat()) for path in folder.iterdir()}
    yield folder
    for path in folder.iterdir():
        assert path.read_bytes() == before[path.name][0], path
        assert path.stat().st_mtime_ns == before[path.name][1].st_mtime_ns, path
    assert {path.name for path in folder.iterdir()} == set(before)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o700)
    (folder / ".kvlab").mkdir(mode=0o700)
    return folder


def append(root, text):
    with (root / ".kvlab" / "journal").open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("path", [
    "../home/thesis.txt", "/etc/hostname", "3f/../../home/thesis.txt", ".kvlab/writing/../../../home/thesis.txt",
    "mine.txt", ".kvlab/journal", ".kvlab/broken/01234567-../../../home/thesis.txt", "..", "",
    f"00/{path_of('k').partition('/')[2]}", "a\x1bb", "ключ",
])  # fmt: skip
def test_a_journal_names_files_of_the_stores_own_form_only(root, outside, path):
    assert not is_own(path)
    (root / "mine.txt").write_bytes(b"not the store's")
    with DiskStore(root, 1 << 20) as store:
        assert store.put("k", bytes(100))
        append(root, f"+ {path}\n")
        for index in range(5):  # over the budget: something must leave
            assert store.put(f"k{index}", bytes(400_000))
        assert path not in store._folder.index.sizes
        assert sorted(store.keys()) == ["k3", "k4"]
    assert (root / "mine.txt").read_bytes() == b"not the store's"


@pytest.mark.parametrize("line", [
    "+ -1000000000 {}", "+ 0 {}", "- evicted {}", "+ {}", "+  {}", "- {}", "+ {}\r", "- a\x1b[2J {}",
    "- " + "x" * 900 + " {}", "\0", "+",
    "- evicted {}\n+ {}\n- deleted {}",
])  # fmt: skip
def test_what_a_journal_claims_never_makes_room(root, line):
    """Sizes are the file system's, and what is there counts, whatever the journal says."""
    ghost = path_of("ghost")
    with DiskStore(root, 1 << 20) as store:
        for index in range(40):
            append(root, line.replace("{}", path_of(f"k{index - 1}") if index % 2 else ghost) + "\n")
            store.put(f"k{index}", bytes(200_000))
            on_disk = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
            assert on_disk <= 1 << 20
            assert store.used_bytes >= 0
        assert all(len(reason) < 70 and reason.isprintable() for reason in store._folder.gone.values())
        append(root, "nonsense\n")
        assert store.used_bytes == sum(path.stat().st_size for path in root.rglob("*.safetensors"))


def test_sizes_of_what_others_announce_are_asked_of_the_file_system(root):
    with DiskStore(root, 1 << 20) as store:
        store.put("k", bytes(1000))
        planted = root / path_of("planted")
        planted.parent.mkdir(mode=0o700, exist_ok=True)
        planted.write_bytes(bytes(300_000))
        append(root, f"+ {path_of('planted')}\n")
        assert store.contains_many(["planted"]) == [True]
        assert store.used_bytes == 301_000


def test_a_journal_of_a_gigabyte_is_not_read(root, monkeypatch):
    with DiskStore(root, 1 << 20) as store:
        assert store.put("k", b"v")
        os.truncate(root / ".kvlab" / "journal", 1 << 30)
        read = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, size, at: read.append(size) or pread(fd, size, at))
        assert store.contains_many(["k", "l"]) == [True, False]
        assert store.put("l", b"v")
        assert sum(read) < 10_000
        assert (root / ".kvlab" / "journal").stat().st_size < 1000


LINKS = {
    "journal": ".kvlab/journal",
    "private": ".kvlab",
    "writing": ".kvlab/writing",
    "broken": ".kvlab/broken",
    "fanout": path_of("key").partition("/")[0],
}


@pytest.mark.parametrize("what", LINKS)
@pytest.mark.parametrize("kind", ["link", "pipe", "file", "folder"])
def test_what_is_in_the_place_of_the_stores_own_is_refused(root, outside, what, kind):
    place = root / LINKS[what]
    if (kind == "file") == (what == "journal") or (kind == "folder") != (what == "journal"):
        kind = "link"
    if what == "private":
        place.rmdir()
    place.parent.mkdir(mode=0o700, exist_ok=True)
    target = outside / "thesis.txt" if what == "journal" else outside
    {
        "link": lambda: place.symlink_to(target),
        "pipe": lambda: os.mkfifo(place),
        "file": lambda: place.write_bytes(b""),
        "folder": lambda: place.mkdir(),
    }[kind]()
    with pytest.raises(ConfigError, match="in the place of a") as caught:
        DiskStore(root, 1 << 20)
    assert len(str(caught.value).splitlines()) == 1


def test_a_journal_with_a_second_name_is_refused(root, outside):
    os.link(outside / "thesis.txt", root / ".kvlab" / "journal")
    with pytest.raises(ConfigError, match="hard link"):
        DiskStore(root, 1 << 20)


def test_a_file_outside_keeps_its_mode(root, outside):
    """With `shared`, whoever may write to the folder may put a hard link in the place of one of its files."""
    thesis = outside / "thesis.txt"
    thesis.chmod(0o600)
    (root / ".kvlab").mkdir(exist_ok=True)
    (root / ".kvlab" / "journal").unlink(missing_ok=True)
    os.link(thesis, root / ".kvlab" / "journal")
    with pytest.raises(ConfigError, match="hard link"):
        open_store(f"file://{root}?shared=true")
    assert thesis.stat().st_mode & 0o777 == 0o600


def test_a_link_made_while_the_store_is_open_is_not_followed(root, outside):
    with DiskStore(root, 1 << 20) as store:
        (root / LINKS["fanout"]).symlink_to(outside)
        assert store.get("key") is None
        assert store.size_of("key") is None
        with pytest.raises(StoreError):
            store.put("key", b"secret")
        assert not store.delete("key")
        assert not store.quarantine("key", "test")
        assert store.put("other", b"v")
        assert bytes(store.get("other")) == b"v"


def test_a_hard_link_is_read_and_replaced_but_its_file_stays_as_it_is(root, outside):
    with DiskStore(root, 1 << 20) as store:
        path = root / path_of("k")
        path.parent.mkdir(mode=0o700)
        os.link(outside / "thesis.txt", path)
        assert store.get("k") is not None
        assert store.put("k", b"v")
        assert bytes(store.get("k")) == b"v"


def test_a_device_or_socket_in_the_place_of_a_file_is_a_miss(root):
    import socket

    with DiskStore(root, 1 << 20) as store:
        path = root / path_of("k")
        path.parent.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.open(path.parent, os.O_RDONLY)
            listener.bind(f"/proc/self/fd/{here}/{path.name}")  # the whole path would be too long
            os.close(here)
            assert store.get("k") is None
            assert store.size_of("k") is None
            assert store.put("k", b"v")
        assert bytes(store.get("k")) == b"v"


def test_a_folder_that_others_may_write_to_is_refused_unless_shared(root):
    root.chmod(0o770)
    with pytest.raises(ConfigError, match=r"writable by others \(mode 0770\).*shared=true"):
        open_store(f"file://{root}")
    with open_store(f"file://{root}?shared=true") as store:
        assert store.put("k", b"v")
    root.chmod(0o700)
    (root / ".kvlab" / "writing").chmod(0o777)
    with pytest.raises(ConfigError, match="writing is writable by others"):
        open_store(f"file://{root}")


def test_a_folder_of_another_user_is_refused_unless_shared(root, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    with pytest.raises(ConfigError, match=f"belongs to user {os.getuid()}, this process runs as {OTHER}.*shared=true"):
        open_store(f"file://{root}")
    with open_store(f"file://{root}?shared=true") as store:
        assert store.put("k", b"v")


def test_a_link_to_the_folder_is_followed_if_its_maker_is_trusted(root, tmp_path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to(root)
    with DiskStore(link, 1 << 20) as store:
        assert store.put("k", b"v")
    real = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: os.stat_result([*real(path)[:4], OTHER, *real(path)[5:]]))
    with pytest.raises(ConfigError, match=f"symbolic link that user {OTHER} made"):
        DiskStore(link, 1 << 20)


def test_modes_do_not_depend_on_the_umask(tmp_path):
    for shared, file_mode, folder_mode in ((False, 0o600, 0o700), (True, 0o660, 0o770)):
        old = os.umask(0o027)
        try:
            root = tmp_path / f"kv{shared}"
            with DiskStore(root, 1 << 20, shared=shared) as store:
                store.put("k", pattern(5000))
        finally:
            os.umask(old)
        for path in [root, *root.rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (folder_mode if path.is_dir() else file_mode), path


def test_the_command_line_is_one_line_in_a_hostile_folder(root, outside, capsys):
    (root / ".kvlab" / "journal").symlink_to(outside / "thesis.txt")
    for command in (["ls"], ["info"], ["verify", "--quarantine"], ["evict", "--to", "0"], ["clear", "--yes"]):
        assert main([command[0], f"file://{root}", *command[1:]]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_own_names_are_those_that_keys_have():
    assert all(is_own(path_of(key)) for key in ODD_KEYS)
    assert is_own(".kvlab/writing/0123456789abcdef")
    assert is_own(".kvlab/broken/01234567-x.safetensors")


def test_keys_lead_nowhere_else(tmp_path):
    for key in ["../home/x", "/etc/x", "..", "a/../../b", "\0", "~root/x", "x" * 1024]:
        with DiskStore(tmp_path / "kv", 1 << 20) as store:
            assert store.put(key, b"v")
            assert bytes(store.get(key)) == b"v"
    assert [path.name for path in tmp_path.iterdir()] == ["kv"]


def test_a_link_put_in_a_new_folders_place_opens_nothing_to_the_group(tmp_path, monkeypatch):
    """Between the making of a folder and the change of its mode."""
    private = tmp_path / "private"
    private.mkdir(0o700)
    shared = tmp_path / "kv"
    original = os.mkdir

    def swapped(path, mode=0o777, *, dir_fd=None):
        original(path, mode, dir_fd=dir_fd)
        if dir_fd is not None:
            os.rmdir(path, dir_fd=dir_fd)
            os.symlink(private, path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", swapped)
    with suppress(StoreError, ConfigError):
        store = open_store(f"file://{shared}?size=1MiB&shared=true")
        store.put("kvlab:m:1", b"x")
    assert private.stat().st_mode & 0o777 == 0o700
    assert not list(private.iterdir())
