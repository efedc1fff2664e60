"""Entry points of other packages that name nothing usable: one ConfigError that says which."""

import sys
import textwrap

import pytest

from kvlab import get_serde, open_store, simulate, sweep, vllm_config
from kvlab import serde as serdes
from kvlab.errors import ConfigError, FormatError
from kvlab.serde import serde_to_read
from kvlab.simulation.replay_tiers import Admission
from kvlab.stores import check_url
from kvlab.stores.eviction import get_policy
from kvlab.stores.memory import MemoryStore
from kvlab.transforms import transform_id

MODULES = {
    "others_good": """
        from kvlab.serde.naive import NaiveSerde
        from kvlab.stores.eviction import LRUPolicy
        from kvlab.stores.memory import MemoryStore
        value = 5
        class Good(MemoryStore): pass
        class Outer:
            class Inner(MemoryStore): pass
        class NoStore: pass
        class Picky:
            def __init__(self): raise RuntimeError("planted")
            @classmethod
            def from_url(cls, url): raise KeyError("secret")
        class Serde(NaiveSerde): pass
        class Policy(LRUPolicy): pass
        from kvlab.transforms import KVTransform
        from kvlab.stores.admission import AdmissionRule
        class Halved(KVTransform):
            def __init__(self, by="2"): self.by = float(by)
        class Long(AdmissionRule):
            def admit(self, key, end_token): return end_token >= 1024
        class NoPolicy: pass
        class PickyPolicy(LRUPolicy):
            def __init__(self, size): pass
        """,
    "others_syntax": "def (",
    "others_broken": "raise RuntimeError('planted')",
    "others_exit": "raise SystemExit(3)",
    "others_lazy": "def __getattr__(name): raise KeyError('planted')",
}
WRONG = {
    "missing": "others_good:Nope",
    "deeper": "others_good:Outer.Nope",
    "no-module": "no_such_module_of_others:X",
    "syntax": "others_syntax:X",
    "broken": "others_broken:X",
    "exit": "others_exit:X",
    "lazy": "others_lazy:X",
    "no-class": "others_good:value",
    "module": "others_good",
    "no-store": "others_good:NoStore",
    "picky": "others_good:Picky",
}
POLICIES = {"good": "others_good:Policy", "needs-size": "others_good:PickyPolicy", "no-policy": "others_good:NoPolicy"}
TRANSFORMS = {"halved": "others_good:Halved", "no-transform": "others_good:NoPolicy"}
RULES = {"long": "others_good:Long", "no-rule": "others_good:NoPolicy", "needs-arguments": "others_good:PickyPolicy"}
GOOD = {"good": "others_good:Good", "inner": "others_good:Outer.Inner", "extra": "others_good:Good [fast]"}


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """A package with these entry points."""
    info = tmp_path / "others-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1\n")
    stores = "".join(f"{name} = {target}\n" for name, target in {**WRONG, **GOOD}.items())
    kinds = "".join(f"{name} = {target}\n" for name, target in {**WRONG, "good": "others_good:Serde"}.items())
    policies = "".join(f"{name} = {target}\n" for name, target in {**WRONG, **POLICIES}.items())
    transforms = "".join(f"{name} = {target}\n" for name, target in {**WRONG, **TRANSFORMS}.items())
    rules = "".join(f"{name} = {target}\n" for name, target in {**WRONG, **RULES}.items())
    groups = {"stores": stores, "serde": kinds, "policies": policies, "transforms": transforms, "admission": rules}
    (info / "entry_points.txt").write_text("".join(f"[kvlab.{name}]\n{text}" for name, text in groups.items()))
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    serdes._found.cache_clear()
    yield
    serdes._found.cache_clear()
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", WRONG)
def test_a_store(name):
    with pytest.raises(ConfigError) as caught:
        open_store(f"{name}://?size=1MiB")
    line = str(caught.value)
    assert name in line
    assert WRONG[name] in line
    assert "kvlab.stores" in line
    assert "\n" not in line
    if name not in ("picky", "no-store"):
        with pytest.raises(ConfigError, match=r"kvlab\.stores"):
            check_url(f"{name}://?size=1MiB")


@pytest.mark.parametrize("name", WRONG)
def test_a_serde(name):
    with pytest.raises(ConfigError) as caught:
        get_serde(name)
    line = str(caught.value)
    assert name in line
    assert WRONG[name] in line
    assert "kvlab.serde" in line
    assert "\n" not in line
    with pytest.raises(FormatError, match=r"kvlab\.serde") as unread:
        serde_to_read(name)
    assert unread.value.reason == "serde"


@pytest.mark.parametrize("name", GOOD)
def test_a_class_that_is_there_is_used(name):
    with open_store(f"{name}://?size=1MiB") as store:
        assert isinstance(store, MemoryStore)
    assert get_serde("good").name == "naive"


def test_options_of_a_class_with_arguments_are_checked_without_opening_it():
    with pytest.raises(ConfigError, match="sise"):
        vllm_config(["memory://?size=1MiB", "good://?sise=1MiB"])


def test_what_a_class_says_of_its_url_is_not_told():
    with pytest.raises(ConfigError) as caught:
        open_store("picky://user:secret@host?size=1MiB")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", [*WRONG, "no-policy", "needs-size"])
def test_a_policy(name):
    for use in (get_policy, lambda name: check_url(f"memory://?size=1MiB&policy={name}")):
        with pytest.raises(ConfigError) as caught:
            use(name)
        line = str(caught.value)
        assert name in line
        assert "\n" not in line
        if name not in ("picky", "needs-size"):
            assert "kvlab.policies" in line


def test_a_policy_that_is_there_is_used_by_name_everywhere(tmp_path):
    with open_store("memory://?size=1MiB&policy=good") as store:
        assert store.put("k", b"v")
    with open_store(f"file://{tmp_path}/kv?size=1MiB&policy=good") as store:
        assert store.put("k", b"v")
    assert vllm_config(["memory://?size=1MiB&policy=good"])
    rows = sweep("chat", ["100 blocks", "memory://?size=90 blocks&policy=good"], ["good", "lru"], workers=2)
    assert [row["policy"] for row in rows] == ["good", "good", "lru"]  # the URL names its own, once
    assert rows[0]["block_hit_rate"] == rows[2]["block_hit_rate"]
    assert simulate("chat", "memory://?size=90 blocks&policy=good").row["policy"] == "good"


@pytest.mark.parametrize("name", [*sorted(set(WRONG) - {"no-store", "picky"}), "no-transform"])
def test_a_transform(name):
    with pytest.raises(ConfigError, match=r"kvlab\.transforms") as caught:
        vllm_config(transform=name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_transform_that_is_there_is_named_with_its_options_and_its_code(tmp_path):
    assert vllm_config(transform="halved:by=4")["kv_connector_extra_config"]["transform"] == "halved:by=4"
    name = transform_id("halved:by=4")
    assert name.startswith("halved:by=4@")
    assert name != transform_id("halved:by=2")
    for wrong, words in {"halved:by=x": "could not convert", "halved:of=2": "of", "halved:2": "must be like"}.items():
        with pytest.raises(ConfigError, match=words):
            vllm_config(transform=wrong)
    with pytest.raises(ConfigError, match=r"unknown transform 'nope'; known: .*halved"):
        vllm_config(transform="nope")
    with pytest.raises(ConfigError, match="must be a name like"):
        vllm_config(transform=5)
    with pytest.raises(ConfigError, match="naive or lossless tiers; got 'int8"):
        vllm_config(["memory://?size=1MiB&serde=int8"], transform="halved")
    (tmp_path / "others_good.py").write_text((tmp_path / "others_good.py").read_text() + "# other code")
    with pytest.raises(ConfigError, match="has changed since it was loaded: restart"):
        transform_id("halved:by=4")


@pytest.mark.parametrize("name", [*sorted(set(WRONG) - {"no-store", "picky"}), "no-rule", "needs-arguments"])
def test_an_admission_rule(name):
    for use in (lambda: vllm_config(store_rule=name), lambda: Admission(rule=name)):
        with pytest.raises(ConfigError, match=r"kvlab\.admission") as caught:
            use()
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_admission_rule_that_is_there_is_used_by_name():
    assert vllm_config(store_rule="long")
    with pytest.raises(ConfigError, match=r"unknown admission rule 'nope'; known: .*long"):
        vllm_config(store_rule="nope")
    all_of_it = simulate("chat", "1000 blocks", chunk_tokens=512, admission=1)
    by_rule = simulate("chat", "1000 blocks", chunk_tokens=512, admission=Admission(rule="long"))
    assert all_of_it.row["block_hit_rate"] > 0
    assert by_rule.row["block_hit_rate"] == 0  # the first 512 tokens of a prompt are never kept
