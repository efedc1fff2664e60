"""`evict` and `touch_all` are `victim` with `discard`, and `touch`, done at once; policies by name and as classes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlab
from kvlab.errors import ConfigError
from kvlab.stores.eviction import POLICIES, FIFOPolicy, LRUPolicy, get_policy
from kvlab.stores.memory import MemoryStore

STEPS = st.lists(st.tuples(st.sampled_from("aaate"), st.integers(0, 15), st.integers(1, 3)), max_size=150)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(steps=STEPS)
def test_at_once_is_the_same(name, steps):
    one, other = get_policy(name), get_policy(name)
    for what, key, size in steps:
        if what == "a":
            one.admit(key, size)
            other.admit(key, size)
        elif what == "t":
            keys = [key, key + 1, key + 2, key]
            one.touch_all(keys)
            for each in keys:
                other.touch(each)
        else:
            leaving = other.victim()
            other.discard(leaving)
            assert one.evict() == leaving
    while (leaving := other.victim()) is not None:
        other.discard(leaving)
        assert one.evict() == leaving
    assert one.evict() is None


class Mine(FIFOPolicy):
    """Of this module, which other processes can import."""


class Named(LRUPolicy):
    name = "named"


def test_a_class_is_taken_where_a_name_is():
    def rows(policies, workers):
        return kvlab.sweep("chat", ["200 blocks", "300 blocks"], policies, workers=workers, progress=False)

    class Local(LRUPolicy):
        name = "local"

    by_name = rows(["fifo", "lru", "lru"], 1)
    for workers in (1, 2):
        mine = rows([Mine, Named, Local], workers)
        assert [row.pop("policy") for row in mine] == ["Mine", "Mine", "named", "named", "local", "local"]
        assert mine == [{name: value for name, value in row.items() if name != "policy"} for row in by_name]
    assert kvlab.simulate("chat", "200 blocks", policy=Named).row["policy"] == "named"
    with MemoryStore(1 << 20, policy=Named) as store:
        assert "policy='named'" in repr(store)


def test_a_class_put_into_the_table_is_known_to_a_sweep(monkeypatch):
    monkeypatch.setitem(POLICIES, "mine", Mine)
    rows = kvlab.sweep("chat", ["200 blocks", "300 blocks"], ["mine", "fifo"], workers=2, progress=False)
    assert [row["policy"] for row in rows] == ["mine", "mine", "fifo", "fifo"]
    assert rows[0]["block_hit_rate"] == rows[2]["block_hit_rate"]


def test_a_script_that_sweeps_while_it_is_imported_is_not_imported_again_and_again(tmp_path):
    (tmp_path / "unguarded.py").write_text(
        "import kvlab\nfrom kvlab.stores.eviction import LRUPolicy\nclass Own(LRUPolicy): name = 'own'\n"
        "print(len(kvlab.sweep('chat', ['9 blocks', '8 blocks'], [Own], workers=2, progress=False)))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path[:0] = [{root!r}, {str(tmp_path)!r}]; import unguarded"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("2\n", "")


class Broken(LRUPolicy):
    def __init__(self):
        raise KeyError("planted")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (5, "policy must be a name or a class made from EvictionPolicy, got int"),
        (dict, "policy must be a name or a class made from EvictionPolicy, got dict"),
        (LRUPolicy(), "policy must be a name or a class made from EvictionPolicy, got LRUPolicy"),
        ("", "unknown eviction policy ''"),
        (Broken, "policy 'Broken' must be made without arguments and raise nothing: KeyError: 'planted'"),
    ],
)
def test_what_is_no_policy_is_told_in_one_line(policy, words):
    for use in (
        lambda: kvlab.simulate("chat", "10 blocks", policy=policy),
        lambda: kvlab.sweep("chat", ["10 blocks"], [policy], progress=False),
        lambda: MemoryStore(1 << 20, policy=policy),
    ):
        with pytest.raises(ConfigError, match=words):
            use()


def test_a_policy_of_the_url_is_simulated_and_shown(tmp_path):
    own = "memory://?size=1GiB&policy=mru"
    rows = kvlab.sweep(
        "chat", ["1GiB", own], ["lru", "s3fifo", "belady"], model="Qwen2.5-7B", workers=1, progress=False
    )
    shown = [(row["policy"], row["urls"]) for row in rows]
    plain = "memory://?size=1GiB"
    assert shown[:3] == [("lru", plain), ("mru", own), ("s3fifo", f"{plain}&policy=s3fifo")]
    assert shown[3:] == [("belady", "")] * 2
    alone = kvlab.simulate("chat", own, model="Qwen2.5-7B", policy="lru")
    assert (alone.row["policy"], alone.row["block_hit_rate"]) == ("mru", rows[1]["block_hit_rate"])
    assert alone.row["block_hit_rate"] != rows[0]["block_hit_rate"]
    stack = [own, f"file://{tmp_path}/kv?size=2GiB", "redis://host?size=1TiB"]
    (mixed,) = kvlab.sweep("chat", [stack], ["fifo"], model="Qwen2.5-7B", workers=1, progress=False)
    assert mixed["policy"] == "mru + fifo"
    assert mixed["urls"] == "+".join([own, f"{stack[1]}&policy=fifo", stack[2]])

    class Unnamed(LRUPolicy):
        pass

    assert kvlab.simulate("chat", plain, model="Qwen2.5-7B", policy=Unnamed).row["urls"] == ""
    with pytest.raises(ConfigError, match="unknown eviction policy 'best'"):
        kvlab.simulate("chat", "memory://?size=10 blocks&policy=best", policy="belady")
