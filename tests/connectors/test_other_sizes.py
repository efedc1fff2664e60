"""What an engine of another tensor-parallel size stored is not served, and a miss names the field that differs."""

import json

import numpy as np
import pytest

import kvlab
from kvlab.cli.store import main as store_command
from kvlab.connectors.vllm.namespace import rank_namespace
from kvlab.hashing import Namespace, block_hashes
from kvlab.page_objects import PageObjects
from tests.connectors.engine import BLOCK, connector, drain, engine, generate, prompt
from tests.connectors.models import short_demo


@pytest.fixture
def named(monkeypatch):
    """The namespace of an engine of so many ranks, of vLLM's own configuration; no rank is started, which would choose
    the layout."""
    from vllm.engine.arg_utils import EngineArgs

    from kvlab.connectors.vllm import compat
    from kvlab.connectors.vllm.namespace import engine_namespace

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(compat, "layout_name", lambda *_: "LBHNC")

    def of(ranks: int) -> Namespace:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        arguments = EngineArgs(short_demo(), tensor_parallel_size=ranks, dtype="float32", skip_tokenizer_init=True)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=3 // ranks, head_size=64, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["model.layers.0.self_attn.attn"], spec)]
        cache = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)
        config = arguments.create_engine_config()
        return engine_namespace(config, cache, extra="", serde="naive", outlives=True, loaded_here=False)

    return of


def test_the_namespaces_of_one_rank_and_of_three_differ_in_named_fields(named):
    one, three = named(1), named(3)
    assert one.differing(json.loads(three.canonical)) == ["pages", "tensor_parallel"]
    assert (one.fields["tensor_parallel"], three.fields["tensor_parallel"]) == (1, 3)


def test_a_miss_page_and_the_store_command_name_the_field(tmp_path, capsys):
    p, url = prompt(300), f"file://{tmp_path}?size=1GiB"
    with engine(["memory://?size=64MiB", url], save_partial_block=False) as llm:
        cache = kvlab.attach(llm)
        ours = rank_namespace(connector(llm).namespace, 0)
        theirs = Namespace(ours.model, {**ours.fields, "tensor_parallel": 2})
        of_two = PageObjects(url, namespace=theirs)
        key = theirs.key(block_hashes(p, BLOCK)[1])
        assert of_two.save(key, np.ones((2, 6, 64), np.uint8), first_token=0, end_token=64)
        of_two.close()
        assert generate(llm, [prompt(300)])[0].hit == 0
        drain(llm)
        page = cache.why()
        assert page.reason == "other_namespace"
        assert "holds KV of its tokens that another engine stored: tensor_parallel differ" in page.lines()[-2]
        assert not connector(llm).hook_errors
    assert store_command(["info", url]) == 0
    shown = capsys.readouterr().out
    assert "tensor_parallel=1" in shown
    assert "tensor_parallel=2" in shown
    assert "dtype=" not in shown, "what is the same in all is left out"
    assert store_command(["info", url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["groups"]
    assert sorted(group["differs"]["tensor_parallel"] for group in found) == [1, 2]
