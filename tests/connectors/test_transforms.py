"""A transform of KV and an admission rule of another package, in a real engine."""

import pytest
import torch

from kvlab.connectors.transformers import load_model
from kvlab.connectors.vllm import pages as pages_module
from kvlab.errors import ConfigError
from kvlab.paged import Opaque
from kvlab.stores.admission import RULES, AdmissionRule
from kvlab.transforms import TRANSFORMS, KVTransform
from tests.connectors.engine import connector, drain, engine, generate, prompt
from tests.connectors.models import short_demo
from tests.connectors.test_attach import said, zeroed
from tests.support.tiers import cache_server

MEMORY = "memory://?size=64MiB"
seen: list[tuple[int, ...]] = []


class Halved(KVTransform):
    """Exact in floats."""

    def __init__(self, by="2"):
        self.by = float(by)

    def on_save(self, kv):
        seen.append(tuple(kv.shape))
        return kv / self.by

    def on_load(self, kv):
        return kv * self.by


class WithoutV(KVTransform):
    def on_save(self, kv):
        kv[2, :, :, 1] = 0
        return kv


class Broken(KVTransform):
    def __init__(self, how):
        self.how = how

    def on_save(self, kv):
        if self.how == "raises":
            raise RuntimeError("planted")
        if self.how == "exits":
            raise SystemExit("planted")
        return {"nan": kv * float("nan"), "shape": kv[:, :-1], "dtype": kv.half(), "nothing": None}[self.how]


class Long(AdmissionRule):
    def admit(self, key, end_token):
        if end_token == 128:
            raise SystemExit("planted")
        return end_token <= 64


@pytest.fixture(autouse=True)
def package(monkeypatch):
    for cls in (Halved, WithoutV, Broken):
        monkeypatch.setitem(TRANSFORMS, cls.__name__, f"{__name__}:{cls.__name__}")
    monkeypatch.setitem(RULES, "Long", f"{__name__}:Long")
    seen.clear()


@pytest.fixture
def server(tmp_path):
    with cache_server(tmp_path / "kvlab.sock", "512MiB") as server:
        yield server


def twice(llm, tokens, **more):
    return generate(llm, [tokens])[0], generate(llm, [tokens], **more)[0]


def test_kv_goes_through_it_on_save_and_on_load():
    with engine([MEMORY], transform="Halved:by=4") as llm:
        first, second = twice(llm, prompt(300))
        assert (first.hit, second.hit) == (0, 299)
        assert second.tokens == first.tokens
        assert {shape[1] for shape in seen} == {32, 300 % 32}  # the tokens of an object and no others
        exact = generate(llm, [prompt(300)], extra_args={"kv_transfer_params": {"kvlab": {"exact": True}}})[0]
        assert (exact.hit, exact.tokens) == (0, first.tokens)


def test_the_engine_computes_from_what_was_kept():
    from kvlab import capture

    model = load_model(short_demo()).float()
    kv = capture(model, prompt(300))
    with engine([MEMORY], transform="WithoutV") as llm:
        first, second = twice(llm, prompt(300))
    assert second.hit == 299
    assert first.tokens == said(model, kv)
    assert second.tokens == said(model, zeroed(kv, 2)) != first.tokens


def test_what_one_transform_stored_is_nothing_to_others(tmp_path):
    tiers, hits = [MEMORY, f"file://{tmp_path}/kv?size=64MiB&serde=lossless"], {}
    for name in ("Halved:by=4", "Halved:by=2", "", "Halved:by=4"):
        with engine(tiers, transform=name) as llm:
            hits.setdefault(name, []).append(generate(llm, [prompt(300)])[0].hit)
            drain(llm)
    assert hits == {"Halved:by=4": [0, 299], "Halved:by=2": [0], "": [0]}


def test_engines_of_one_server_share_what_one_transform_kept(server):
    """Another transform, and none, find nothing of it, in one cache of a host."""
    hits = []
    for name in ("Halved:by=4", "Halved:by=4", "Halved:by=2", ""):
        with engine([f"kvlab://{server.path}"], transform=name) as llm:
            answer = generate(llm, [prompt(300)])[0]
            hits.append(answer.hit)
            assert answer.tokens == generate(llm, [prompt(300)])[0].tokens
            drain(llm)
            assert not connector(llm).hook_errors
    assert hits == [0, 299, 0, 0]


def test_one_that_breaks_costs_the_object():
    for how in ("nan", "raises", "exits", "shape"):
        with engine([MEMORY], transform=f"Broken:how={how}") as llm:
            first, second = twice(llm, prompt(70))
            assert (first.hit, second.hit) == (0, 0), how
            assert second.tokens == first.tokens


def test_pages_that_are_not_proven_are_refused(monkeypatch):
    monkeypatch.setattr(pages_module, "understand", lambda scratch: Opaque("nothing proves it"))
    words = "transform 'Halved' needs KV, and these pages are opaque: nothing proves it"
    with pytest.raises(ConfigError, match=words), engine([MEMORY], transform="Halved"):
        pass


def test_only_what_a_rule_admits_is_saved_and_its_errors_are_told_once(caplog):
    with engine([MEMORY], store_rule="Long") as llm:
        first, second = twice(llm, prompt(300))
        assert (first.hit, second.hit) == (0, 64)
        assert len(connector(llm).scheduler.index._entries) == 1
        assert torch.tensor(second.tokens).equal(torch.tensor(first.tokens))
        generate(llm, [prompt(300, ending=1)])
        assert connector(llm).scheduler.counters["errors"] == 3
        assert sum("could not plan" in record.getMessage() for record in caplog.records) == 1
