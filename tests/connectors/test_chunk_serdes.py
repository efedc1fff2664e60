"""`cachegen` at secondary tiers of a real engine: chunks that the tier worker codes, with the tables of the model."""

import json
from pathlib import Path

import pytest
import torch

from kvlab.codecs import PageCodec
from kvlab.connectors.vllm import pages
from kvlab.errors import ConfigError
from kvlab.geometry import AXES
from kvlab.paged import Opaque
from kvlab.serde import get_serde
from kvlab.serde.tables import FILE, profile, save_tables
from tests.connectors.damage import cut_short, flip_a_bit, objects
from tests.connectors.engine import BLOCK, connector, drain, empty_memory, engine, generate, prompt
from tests.connectors.models import KEPT, TOKEN_BYTES, gemma, short_demo
from tests.connectors.test_codecs import ask_exactly, slots_by_name
from tests.forged import data_of, forged, header_of

LAYERS = len(KEPT)


@pytest.fixture
def model(tmp_path):
    """The short demo model in a folder of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(short_demo()).iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def tables(path, *, layers=LAYERS, seed=0):
    """Tables of a pretended text."""
    text = 4.0 * torch.randn(layers, 64, 3, 2, 64, generator=torch.Generator().manual_seed(seed))
    save_tables(path, [profile([text], AXES, 0.25)])


def test_chunks_come_back_as_the_twin_has_them_and_all_else_is_computed(model, tmp_path, expected, monkeypatch):
    settings, p = {"model": str(model)}, prompt(300)
    tiers = ["memory://?size=64MiB", f"file://{tmp_path}/kv?size=1GiB&serde=cachegen:level=0.25"]
    told = pytest.raises(ConfigError, match=f"there is no {FILE} in .*; make it with: kvlab profile MODEL TEXT, or")
    with told, engine(tiers, settings):
        pass
    tables(model / FILE)
    with engine(tiers, settings) as llm:
        assert generate(llm, [p])[0].tokens == expected(p)
        drain(llm)
        held = slots_by_name(llm)
        empty_memory(llm)
        again = generate(llm, [p])[0]
        assert (again.hit, again.row["tier"]) == (299, "disk")
        found = slots_by_name(llm)
        assert found.keys() == held.keys()
        kv_map = pages.proven_map(
            llm.llm_engine.vllm_config, connector(llm)._kv_cache_config, connector_of_worker().kv_caches,
            connector_of_worker()._pages,
        )  # fmt: skip
        twin = PageCodec(get_serde(f"cachegen:tables={model / FILE},level=0.25"), kv_map)
        for key, slots in held.items():
            want = torch.zeros_like(slots)
            is_partial = len(slots) == 1 and not kv_map.read(slots, BLOCK)[:, 300 % BLOCK :].any()
            twin.decode(twin.encode(slots, 300 % BLOCK if is_partial else len(slots) * BLOCK), want)
            assert found[key].equal(want)
            assert not found[key].equal(slots), "it is lossy"
        exact = ask_exactly(llm, p)
        assert (exact.hit, exact.row["miss"], exact.tokens) == (0, "not_exact", expected(p))
        assert not connector(llm).hook_errors
    stored = {path: path.read_bytes() for path in objects(tmp_path / "kv")}
    assert {header_of(value)["__metadata__"]["serde"] for value in stored.values()} == {"cachegen"}
    assert sum(map(len, stored.values())) < 300 * TOKEN_BYTES / 3
    with engine(tiers[1:], settings) as llm:  # without a memory tier
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens) == (299, again.tokens)
        for damage in (flip_a_bit, cut_short, of_other_tables):
            for path, value in stored.items():
                path.write_bytes(value)
                damage(path, [])
            answer = generate(llm, [p])[0]
            assert (answer.hit, answer.tokens) == (0, expected(p)), damage.__name__
            drain(llm)
        assert not connector(llm).hook_errors
    (model / FILE).unlink()
    tables(model / FILE, seed=1)
    with engine(tiers, settings) as llm:
        assert generate(llm, [p])[0].hit == 0, "other tables, another namespace"
    tables(tmp_path / "short", layers=2)
    told = pytest.raises(ConfigError, match="are for 2 layers of 3 heads, a rank of this engine has 6 of 3")
    with told, engine([f"file://{tmp_path}/kv?size=1GiB&serde=cachegen:tables={tmp_path}/short,level=0.25"], settings):
        pass
    monkeypatch.setattr(pages, "understand", lambda scratch: Opaque("its swizzle"))
    told = pytest.raises(ConfigError, match="must tell K from V, and these pages are opaque: its swizzle")
    with told, engine(tiers, settings):
        pass


def of_other_tables(path, _others):
    """The object as if it had been coded with these, sealed as its writer would."""
    header, data = header_of(path.read_bytes()), data_of(path.read_bytes())
    header["__metadata__"]["params"] = json.dumps({"table": "0" * 32})
    path.write_bytes(forged(header, data))


def connector_of_worker():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def test_layers_with_windows_are_refused(tmp_path):
    settings = gemma(tmp_path, ["sliding_attention", "full_attention"] * 2)
    told = pytest.raises(ConfigError, match="some of this model's layers keep only a window of them; use int8")
    with told, engine([f"file://{tmp_path}/kv?size=1GiB&serde=cachegen-lmcache"], settings):
        pass
