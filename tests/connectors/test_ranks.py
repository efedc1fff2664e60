"""Two ranks, of a tensor-parallel group or two pipeline stages, in two worker processes: one index in the scheduler,
every rank copies its own part."""

import os

import pytest
import torch

from kvlab.connectors.vllm.namespace import rank_namespace
from kvlab.stores import open_store
from tests.connectors.engine import BLOCK, connector, empty_memory, engine, generate, prompt

NUM_TOKENS = 300
LAYER_BYTES = 320 * 2 * 2 * 32 * 4  # tokens of ten pages, K and V, two heads of 32 floats


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small Llama whose heads divide by two (the demo model has three KV heads)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def package(folder, monkeypatch) -> None:
    """A package with a transform that is exact in floats, as worker processes find it."""
    about = folder / "lab_halved-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-halved\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[kvlab.transforms]\nhalved = lab_halved:Halved\n")
    (folder / "lab_halved.py").write_text(
        "from kvlab.transforms import KVTransform\n\n\nclass Halved(KVTransform):\n"
        "    def on_save(self, kv):\n        return kv / 4\n\n    def on_load(self, kv):\n        return kv * 4\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.mark.parametrize(
    ("way", "rank_bytes", "transform"),
    [
        ("tensor_parallel_size", {3 * LAYER_BYTES // 2}, "halved"),  # each rank has its own heads
        ("pipeline_parallel_size", {2 * LAYER_BYTES, LAYER_BYTES}, ""),
    ],
)
def test_two_ranks_answer_from_every_tier(model, tmp_path, monkeypatch, way, rank_bytes, transform):
    package(tmp_path / "packages", monkeypatch)
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}|{cpus[-1]}")
    settings = {
        "model": model,
        "skip_tokenizer_init": True,
        way: 2,
        "distributed_executor_backend": "mp",
        "kv_cache_memory_bytes": 32 << 20,
    }
    if way.startswith("pipeline"):  # on a CPU vLLM makes the second stage's inputs only where it compiles
        settings |= {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}}
    p = prompt(NUM_TOKENS)
    tiers = ["memory://?size=64MiB", f"file://{tmp_path}/tier?size=1GiB"]
    with engine(tiers, settings, transform=transform) as llm:
        scheduler = connector(llm).scheduler
        assert len(scheduler.tiers.opening.namespaces) == 2

        def ask(length: int = NUM_TOKENS):
            return generate(llm, [p[:length]], detokenize=False)[0]

        def settle() -> None:
            """Reports come with steps: make some until both ranks have handed everything on."""
            for _ in range(50):
                if not scheduler.saves.in_flight:
                    return
                ask(BLOCK - 1)
            raise AssertionError(f"{len(scheduler.saves.in_flight)} objects were never reported as written")

        first = ask()
        settle()
        assert first.hit == 0
        assert len(set(first.tokens)) > 4, "a model that says one thing only would prove nothing"
        memory = ask()
        assert (memory.hit, memory.row["tier"]) == (299, "memory")
        assert memory.row["bytes"] in rank_bytes
        empty_memory(llm)
        secondary = ask()
        assert (secondary.hit, secondary.row["tier"]) == (299, "disk")
        assert secondary.row["bytes"] in rank_bytes
        settle()
        empty_memory(llm)
        # What one rank lost, no rank may promise: everything of the second one's.
        of_second = rank_namespace(connector(llm).namespace, 1).id
        with open_store(tiers[1]) as disk:
            lost = [key for key in list(disk.keys()) if key.split(":")[2] == of_second]
            assert len(lost) in (6, 7), "the prompt's, and where `settle` had to ask, that prompt's"
            assert all(disk.delete(key) for key in lost)
        alone = ask()
        assert alone.hit == 0
        assert first.tokens == memory.tokens == secondary.tokens == alone.tokens
        assert not connector(llm).hook_errors
