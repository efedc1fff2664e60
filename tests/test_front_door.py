"""What a reader in a notebook sees first: names by completion, and answers on a cell's last line."""

from importlib import import_module

import pytest
import torch

import kvlab
from kvlab.connectors.captured import KV
from kvlab.geometry import AXES
from kvlab.paged import page_layout
from kvlab.serde.tables import profile
from kvlab.simulation.generate import generate_traffic

PACKAGES = [
    "kvlab",
    *(f"kvlab.{room}" for room in ["connectors", "paged", "serde", "serving", "sizing", "stores", "testing"]),
]
LONGEST_REPR = 2000


@pytest.mark.parametrize("name", PACKAGES)
def test_completion_offers_the_public_names_alone(name):
    package = import_module(name)
    assert set(dir(package)) - {"__version__"} == set(package.__all__)
    for each in package.__all__:
        assert getattr(package, each) is not None
    with pytest.raises(AttributeError):
        package.no_such_name  # noqa: B018


def answers():
    kv = torch.randn(40, 600, 4, 2, 32, dtype=torch.bfloat16)
    halves = [tuple(layer.unbind(2)[half] for layer in kv) for half in (0, 1)]
    pages = {f"model.layers.{i}.self_attn.attn": torch.zeros(64, 128, dtype=torch.uint8) for i in range(80)}
    engine = kvlab.CacheEngine("memory://?size=64MiB", namespace="model")
    engine.save(range(600), kv)
    yield "simulation", kvlab.simulate(generate_traffic("chat", 200), "1000 blocks")
    yield "traffic", generate_traffic("chat", 200)
    yield "captured", KV(*halves, tuple(range(600)), 600, "model")
    yield "encoded", kvlab.get_serde("int4").encode(kv, AXES)
    yield "tables", profile([kv[:, :256]], AXES, 0.25)
    yield "layout", page_layout(pages, num_blocks=64, page_bytes=dict.fromkeys(pages, 128), name="NHD")
    yield "hit", engine.lookup(range(600))
    yield "size", kvlab.size_calculator("Qwen2.5-7B")
    yield "settings", kvlab.vllm_config()


def test_no_answer_fills_the_screen():
    for name, answer in answers():
        assert len(repr(answer)) <= LONGEST_REPR, name


def test_a_simulation_shows_its_rates_as_a_table():
    shown = repr(kvlab.simulate(generate_traffic("chat", 200), "1000 blocks"))
    assert any(line.split()[0] == "block_hit_rate" for line in shown.splitlines())
