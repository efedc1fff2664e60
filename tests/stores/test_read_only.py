"""A folder on a file system that is mounted read-only can be looked at, with or without a journal."""

import errno
import os
import shutil

import pytest

from kvlab.cli.store import main
from kvlab.container import Part, pack
from kvlab.errors import StoreError
from kvlab.stores import open_store

KEYS = [f"kvlab:m:0:{index}" for index in range(5)]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class ReadOnly:
    """`os` as a read-only mount answers: what is there is there, and nothing changes."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        for name in ("unlink", "rename", "rmdir", "utime", "mkdir", "fchmod"):
            monkeypatch.setattr(os, name, self.refusing(getattr(os, name), name))
        opened = os.open
        monkeypatch.setattr(os, "open", lambda path, flags, *mode, **options: opened(path, flags, *mode, **options)
                            if not flags & WRITES else self.refuse(path, "open"))  # fmt: skip

    def refusing(self, real, name):
        def called(path, *args, **options):
            if name == "mkdir" and (options.get("dir_fd") is None and os.path.exists(path)):
                raise FileExistsError(errno.EEXIST, "injected", path)
            return self.refuse(path, name)

        return called

    def refuse(self, path, name):
        raise OSError(errno.EROFS, f"injected into {name}", str(path))


@pytest.fixture(params=["a journal", "no journal", "no .kvlab"])
def folder(request, tmp_path, monkeypatch):
    root = tmp_path / "kv"
    with open_store(f"file://{root}?size=10MiB") as store:
        for key in KEYS:
            store.put(key, b"".join(pack(key, {"kv": Part("U8", (1000,), memoryview(bytes(1000)))})))
    if request.param == "no journal":
        (root / ".kvlab" / "journal").unlink()
    if request.param == "no .kvlab":
        shutil.rmtree(root / ".kvlab")
    ReadOnly(monkeypatch)
    return root


def test_it_can_be_read(folder, caplog):
    with open_store(f"file://{folder}?size=10MiB") as store:
        assert sorted(store.keys()) == KEYS
        assert len(store.get(KEYS[0])) == store.size_of(KEYS[0])
        assert store.contains_many([KEYS[1], "absent"]) == [True, False]
        assert store.get("absent") is None
        assert store.stats()["used_bytes"] == sum(store.size_of(key) for key in KEYS)
        store.touch(KEYS)
        assert store.why_missing("absent") == "never_stored"
    assert caplog.text == ""


def test_it_takes_no_write(folder):
    with open_store(f"file://{folder}?size=10MiB") as store:
        for write in (
            lambda: store.put("k", b"v"), lambda: store.put(KEYS[0], b"v"),
            lambda: store.delete(KEYS[0]), lambda: store.quarantine(KEYS[0], "test"),
        ):  # fmt: skip
            with pytest.raises(StoreError) as caught:
                write()
            assert caught.value.reason == "erofs"
        assert sorted(store.keys()) == KEYS
        assert store.get(KEYS[0]) is not None


def test_more_than_the_budget_is_no_reason_to_remove_anything(folder, caplog):
    with open_store(f"file://{folder}?size=1kB") as store:
        assert sorted(store.keys()) == KEYS
    assert "could not remove" not in caplog.text


def test_the_command_line_looks_at_it(folder, capsys):
    for command in ("ls", "info", "verify"):
        assert main([command, f"file://{folder}"]) == 0
    assert "5 objects are sound" in capsys.readouterr().out
    assert main(["clear", f"file://{folder}", "--yes"]) == 2


def test_a_folder_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    ReadOnly(monkeypatch)
    with pytest.raises(StoreError, match="injected"):
        open_store(f"file://{tmp_path}/none")
