"""`kvlab store` over a store of another package that raises or answers what is none: one line, and status 2."""

import pytest

from kvlab.__main__ import main
from kvlab.cli import store as command
from kvlab.stores.base import Store, StoreCounters

WRONG = {"raises": RuntimeError("the medium\nis gone"), "exits": SystemExit(9), "memory": MemoryError("none")}
METHODS = ("keys", "size_of", "get_head", "delete", "close")


class Mine(Store):
    broken, how = "", ""
    used_bytes = 0

    def __init__(self):
        self.name, self.counters, self.max_bytes = "mine", StoreCounters(), 1 << 30

    @classmethod
    def from_url(cls, url):
        cls._may("from_url")
        return cls()

    @classmethod
    def _may(cls, method, right=None):
        if method != cls.broken:
            return right
        if cls.how == "text":
            return "text"
        raise WRONG[cls.how]

    def keys(self):
        return self._may("keys", iter(["a"]))

    def size_of(self, key):
        return self._may("size_of", 3)

    def get_head(self, key, num_bytes):
        return self._may("get_head", b"abc")

    def get(self, key):
        return b"abc"

    def get_into(self, key, out):
        out[:3] = b"abc"
        return 3

    def put(self, key, value):
        return True

    def contains_many(self, keys):
        return [True for _ in keys]

    def delete(self, key):
        return self._may("delete", True)

    def close(self):
        self._may("close")


@pytest.fixture
def package(monkeypatch):
    from kvlab import stores

    points = {"mine": f"{__name__}:Mine"}
    monkeypatch.setattr(stores, "found", lambda group: points)
    monkeypatch.setattr(command, "found", lambda group: points)
    return lambda broken, how: (monkeypatch.setattr(Mine, "broken", broken), monkeypatch.setattr(Mine, "how", how))


@pytest.mark.parametrize("how", [*WRONG])
@pytest.mark.parametrize("method", ["from_url", *METHODS])
def test_what_it_raises_is_one_line(package, capsys, method, how):
    package(method, how)
    asked = {"size_of": ["ls"], "get_head": ["verify"], "delete": ["clear", "--yes"]}.get(method, ["ls"])
    assert main(["store", asked[0], "mine://x", *asked[1:]]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("kvlab store: ")
    assert type(WRONG[how]).__name__ in told[0]
    assert "mine" in told[0]


def test_an_answer_of_another_kind_is_one_line(package, capsys):
    package("size_of", "text")
    assert main(["store", "ls", "mine://x"]) == 2
    assert "the store of mine:// raised " in capsys.readouterr().err


def test_what_our_own_stores_raise_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / ".kvlab").mkdir()
    monkeypatch.setitem(command.COMMANDS, "ls", ("", lambda store, arguments: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main(["store", "ls", f"file://{tmp_path}"])
