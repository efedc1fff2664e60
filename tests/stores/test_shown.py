"""A store shows itself as what makes such another, without its secrets."""

import pytest

from kvlab.auth import AuthKey
from kvlab.chunking import Chunker
from kvlab.engine import CacheEngine
from kvlab.errors import StoreError
from kvlab.geometry import KVGeometry
from kvlab.hashing import Namespace
from kvlab.stores import open_store, open_stores
from kvlab.stores.disk import DiskStore
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
from kvlab.stores.wrappers import CountingStore, FaultStore, LatencyStore

NAMES = {
    made.__name__: made
    for made in (open_store, CacheEngine, Chunker, KVGeometry, Namespace, DiskStore, MemoryStore, TieredStore,
                 CountingStore, FaultStore, LatencyStore)
}  # fmt: skip


def again(made):
    """What `repr` evaluates to, which says the same of itself."""
    other = eval(repr(made), dict(NAMES))
    assert type(other) is type(made)
    assert repr(other) == repr(made)
    return other


@pytest.mark.parametrize(
    "url",
    [
        "memory://?size=1MiB&policy=lfu",
        "file://{}?size=10MiB&fsync=true",
        "redis://127.0.0.1:1/3?timeout_ms=7&password_file={}/password",
        "redis-sentinel://127.0.0.1:1,[::1]:2/main?db=1",
        "redis-cluster://127.0.0.1:1",
        "unix://{}/socket?db=2",
    ],
)
def test_an_opened_store_is_its_url(url, tmp_path):
    (tmp_path / "password").write_text("secret")
    url = url.format(tmp_path)
    with open_store(url) as store:
        assert repr(store) == f"open_store({url!r})"
        again(store).close()


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda path: MemoryStore(8192), "MemoryStore(8192)"),
        (lambda path: MemoryStore(8192, policy="arc", wait_s=0.5), "MemoryStore(8192, policy='arc', wait_s=0.5)"),
        (lambda path: DiskStore(path, 9000, fsync=True), "DiskStore('{}', 9000, fsync=True)"),
        (lambda path: open_stores(["memory://?size=1MiB", f"file://{path}"]),
         "TieredStore([open_store('memory://?size=1MiB'), open_store('file://{}')])"),
        (lambda path: TieredStore([MemoryStore(8192)], write="back", store_threshold=2, promote=False),
         "TieredStore([MemoryStore(8192)], write='back', store_threshold=2, promote=False)"),
        (lambda path: CountingStore(MemoryStore(8192)), "CountingStore(MemoryStore(8192))"),
        (lambda path: LatencyStore(MemoryStore(8192), latency_s=0.1), "LatencyStore(MemoryStore(8192), latency_s=0.1)"),
        (lambda path: FaultStore(MemoryStore(8192), fail=0.5), "FaultStore(MemoryStore(8192), fail=0.5)"),
        (lambda path: CacheEngine(MemoryStore(8192), namespace="m"),
         "CacheEngine(MemoryStore(8192), namespace='m')"),
        (lambda path: CacheEngine("memory://?size=1MiB", namespace=Namespace("m", {"rank": 1}), serde="int8",
                                  chunker=Chunker(64, 8), geometry=KVGeometry(2, 3, 8, "float32")), None),
    ],
)  # fmt: skip
def test_others_are_the_call_that_makes_them(make, shown, tmp_path):
    made = make(tmp_path / "kv")
    assert shown is None or repr(made) == shown.format(tmp_path / "kv")
    again(made).close()
    made.close()


def test_no_secret_is_shown(tmp_path):
    url = "redis-sentinel://user:hunter2@127.0.0.1:1/main?sentinel_password=hunter3&db=1"
    with open_store(url) as store:
        assert repr(store) == "open_store('redis-sentinel://***@127.0.0.1:1/main?db=1&sentinel_password=***')"
        assert "hunter" not in repr(open_stores([url, "memory://?size=1MiB"]))
    engine = CacheEngine(MemoryStore(8192), namespace="m", auth=AuthKey(b"k" * 32))
    assert "kkkk" not in repr(engine)
    assert engine.auth.id in repr(engine)


def test_a_notebook_shows_the_tiers(tmp_path, monkeypatch):
    with open_stores(["memory://?size=1MiB", f"file://{tmp_path}/kv?size=2MiB"]) as store:
        store.put("k", bytes(5000))
        store.get("k")
        shown = store._repr_html_()
        assert "<td>memory</td><td>8 KiB</td><td>1 MiB</td><td>1</td><td>1</td>" in shown
        assert "&#x27;memory://?size=1MiB&#x27;" in shown
        assert shown in CacheEngine(store, namespace="m")._repr_html_()

        def fail(*_):
            raise StoreError("down")

        monkeypatch.setattr(store, "rows", fail)
        assert "TieredStore" in store._repr_html_()
