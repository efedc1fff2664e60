import os

import pytest
from servers import Server, running

from kvlab.auth import AuthKey
from kvlab.cli.store import main
from kvlab.connectors.config import vllm_config
from kvlab.container import Part, pack
from kvlab.engine import CacheEngine
from kvlab.errors import ConfigError
from kvlab.hashing import Namespace
from kvlab.stores import open_store
from kvlab.stores.disk.names import path_of

KEYS = [f"kvlab:org-Model:00{ns}:{index:032x}" for ns in ("aa", "bb") for index in range(3)]


def fill(store):
    for index, key in enumerate(KEYS):
        store.put(key, pack(key, {"kv": Part("U8", (1000 + index,), memoryview(bytes(1000 + index)))}))


@pytest.fixture
def url(tmp_path):
    with open_store(f"file://{tmp_path}/kv?size=10MiB") as store:
        fill(store)
    return f"file://{tmp_path}/kv"


def test_ls_and_info(url, capsys):
    assert main(["ls", url]) == 0
    out = capsys.readouterr().out
    assert all(key in out for key in KEYS)
    assert "6 objects" in out
    assert main(["ls", url, "--prefix", "kvlab:org-Model:00aa"]) == 0
    assert "3 objects" in capsys.readouterr().out
    assert main(["info", url + "?size=10MiB"]) == 0
    out = capsys.readouterr().out
    assert "kvlab:org-Model:00aa" in out
    assert "of 10 MiB" in out


def test_verify_names_what_is_broken(url, tmp_path, capsys):
    assert main(["verify", url]) == 0
    assert "6 objects are sound, 0 broken" in capsys.readouterr().out
    cut, flipped = (tmp_path / "kv" / path_of(key) for key in KEYS[:2])
    cut.write_bytes(cut.read_bytes()[:-1])
    raw = bytearray(flipped.read_bytes())
    raw[-1] ^= 1
    flipped.write_bytes(raw)
    assert main(["verify", url]) == 1
    out = capsys.readouterr().out
    assert f"truncated: {KEYS[0]}" in out
    assert f"checksum: {KEYS[1]}" in out
    assert "4 objects are sound, 2 broken (1 checksum, 1 truncated)" in out
    assert main(["verify", url, "--quarantine"]) == 1
    assert main(["verify", url]) == 0
    assert len(list((tmp_path / "kv" / ".kvlab" / "broken").iterdir())) == 2


def test_verify_reads_no_more_of_a_hostile_file_than_its_header(url, tmp_path, capsys):
    """A sparse file takes no room on the disk, and all the memory when it is read."""
    os.truncate(tmp_path / "kv" / path_of(KEYS[0]), 300 << 30)
    empty = tmp_path / "kv" / path_of(KEYS[1])
    empty.write_bytes(b"")
    os.truncate(empty, 300 << 30)
    assert main(["verify", url]) == 1
    found = capsys.readouterr().out
    assert "4 objects are sound, 2 broken (2 corrupt)" in found
    assert main(["verify", url, "--quarantine"]) == 1
    assert main(["verify", url]) == 0


def test_verify_reads_no_object_beyond_the_limit(url, tmp_path, capsys):
    """One that honestly says how large it is."""
    assert main(["verify", url, "--largest", "5000"]) == 1
    found = capsys.readouterr().out.splitlines()
    assert found[-1].startswith("0 objects are sound, 0 broken, 6 could not be read (6 too_large); read 0 B")
    assert found[0] == f"too_large: {KEYS[0]}: object '{KEYS[0]}' of 4.98 KiB is not read: the limit is 4.88 KiB"
    assert main(["verify", url, "--largest", "5000", "--quarantine"]) == 1
    assert main(["verify", url]) == 0, "none was put into quarantine"
    assert main(["verify", url, "--largest", "big"]) == 2


def test_verify_without_memory_is_one_line(url, monkeypatch, capsys):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("numpy.empty", no_memory)
    assert main(["verify", url]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all("no memory for" in line for line in lines[:-1])
    assert lines[-1].startswith(f"0 objects are sound, 0 broken, {len(lines) - 1} could not be read")


def test_set_aside_takes_only_what_is_broken_for_everyone(tmp_path, capsys):
    """Not what another version wrote, nor what other keys signed, or none, under namespaces of their own."""
    url = f"file://{tmp_path}/kv?size=10MiB"
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "key").chmod(0o600)
    ours, theirs = AuthKey(bytes(32)), AuthKey(bytes([1]) * 32)
    part = {"kv": Part("U8", (1000,), memoryview(bytes(1000)))}

    def signed(key, auth, signer):
        fields = {} if auth is None else {"auth": auth.id}
        return b"".join(pack(key, part, {"namespace": Namespace("m", fields).canonical}, auth=signer))

    later = signed("later", ours, ours).replace(b'"kvlab":"2"', b'"kvlab":"3"', 1)
    values = {
        "ours": signed("ours", ours, ours), "theirs": signed("theirs", theirs, theirs),
        "unsigned": signed("unsigned", None, None), "later": later, "forged": signed("forged", ours, None),
    }  # fmt: skip
    with open_store(url) as store:
        for key, value in values.items():
            store.put(key, value)
    assert main(["verify", url, "--auth", str(tmp_path / "key"), "--quarantine"]) == 1
    found = "1 objects are sound, 1 broken (1 auth), 3 for other readers (2 other_auth, 1 version)"
    assert found in capsys.readouterr().out
    with open_store(url) as store:
        assert sorted(store.keys()) == ["later", "ours", "theirs", "unsigned"]
    assert main(["verify", url]) == 0
    assert "3 objects are sound, 0 broken, 1 for other readers (1 version)" in capsys.readouterr().out


def test_evict_lets_the_least_recently_used_go(url, capsys):
    with open_store(url) as store:
        store.get(KEYS[0])
        each = store.size_of(KEYS[0])
    assert main(["evict", url, "--to", str(2 * each + 20)]) == 0
    assert "removed 4 objects" in capsys.readouterr().out
    with open_store(url) as store:
        assert sorted(store.keys()) == sorted([KEYS[0], KEYS[5]])


def test_clear_asks_first(url, capsys):
    assert main(["clear", url]) == 0
    assert "6 objects would be removed" in capsys.readouterr().out
    assert main(["clear", url, "--yes"]) == 0
    with open_store(url) as store:
        assert list(store.keys()) == []


def test_on_redis(tmp_path, capsys):
    with running(Server(tmp_path / "s", "maxmemory 50mb")) as (server,):
        url = f"redis://127.0.0.1:{server.port}"
        with open_store(url) as store:
            fill(store)
        assert main(["ls", url]) == 0
        assert main(["info", url]) == 0
        assert "of 50 MiB" in capsys.readouterr().out
        assert main(["verify", url]) == 0
        assert main(["clear", url, "--yes"]) == 0
        assert "removed 6 objects" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["ls", "memory://"], ["ls", "nonsense"], ["ls", "redis://127.0.0.1:1"], ["ls", "file:///dev/null/kv"]]
)
def test_wrong_use_is_one_line(argv, capsys):
    assert main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: CacheEngine("memory://?serde=int4", namespace="m"), r"serde is no option of 'memory://' here.*serde="),
        (lambda: CacheEngine("memory://?auth=/key", namespace="m"), r"auth is no option.*CacheEngine\(.*--auth FILE"),
        (lambda: vllm_config(["memory://?pinned=true"]), "pinned is no option of 'memory://' here.*open_store"),
        (lambda: vllm_config(["memory://?wait_ms=5"]), "wait_ms is no option of 'memory://' here.*leave it out"),
        (lambda: open_store("memory://?sise=1GiB"), "unknown option 'sise'"),
    ],
)
def test_an_option_of_another_place_says_where_it_belongs(use, words):
    with pytest.raises(ConfigError, match=words):
        use()


def test_looking_makes_no_folder(tmp_path, capsys):
    assert main(["ls", f"file://{tmp_path}/none"]) == 2
    assert "no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_control_characters_in_keys_do_not_reach_the_terminal(url, capsys):
    with open_store(url) as store:
        store.put("evil\x1b[2J\nkey", b"v")
    main(["ls", url])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "evil\\x1b[2J\\nkey" in out
