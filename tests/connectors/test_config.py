"""Connector settings are checked before an engine starts."""

import json
from types import SimpleNamespace

import pytest
import torch

import kvlab
from kvlab.errors import ConfigError
from tests.connectors.engine import SETTINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tier": []}, "unknown connector setting 'tier'; known: tiers"),
        ({"tiers": []}, "tiers must be a list of store URLs"),
        ({"tiers": "memory://"}, "tiers must be a list of store URLs"),
        ({"tiers": ["memory://?sise=1GiB"]}, "unknown option 'sise'"),
        ({"tiers": ["file:///x", "memory://"]}, "memory:// must be the first tier"),
        ({"tiers": ["memory://?size=0"]}, "size must be at least one byte"),
        ({"tiers": ["memory://?size=big"]}, "size must be a number of bytes"),
        ({"tiers": ["file:///x?serde=naive", "file:///y?serde=lossless"]}, "one serde"),
        ({"tiers": ["file:///x?serde=zip"]}, "unknown serde 'zip'; known: "),
        ({"tiers": ["file:///x?sise=1GiB"]}, "unknown option 'sise' in 'file:///x'; known: "),
        ({"tiers": ["file:///x?policy=lur"]}, "unknown eviction policy 'lur'; known: "),
        ({"tiers": ["file://x/y"]}, "a folder needs three slashes"),
        ({"tiers": ["fil:///x"]}, "unknown store scheme 'fil'"),
        ({"tiers": ["redis://h?size=1GiB"]}, "unknown option 'size' in 'redis://h'; known: auth, limit, "),
        ({"tiers": ["redis-sentinel://h"]}, "name the master"),
        ({"tiers": ["file:///x?size=1GiB", "file:///x?size=2GiB"]}, "stands twice among the tiers"),
        ({"tiers": ["file:///x?auth="]}, "option 'auth' of 'file:///x' has no value; give one or leave it out"),
        ({"tiers": 5}, "tiers must be a list of store URLs"),
        ({"tiers": None}, "tiers must be a list of store URLs"),
        ({"tiers": {"a": 1}}, "tiers must be a list of store URLs"),
        ({"tiers": ["file://?size=1GiB"]}, "a disk store needs a folder"),
        ({"tiers": ["file:///x?serde=cachegen:bins=1"]}, "cachegen takes tables and level, got 'bins'"),
        ({"tiers": ["file:///x?serde=cachegen:level=0"]}, "level must be a number like 0.25, got '0'"),
        ({"tiers": ["memory://?serde=cachegen"]}, "'cachegen' has no fixed size, which slots of host memory need"),
        ({"tiers": ["memory://?serde=int8", "file:///x?serde=cachegen"]}, "must have the same serde, got cachegen"),
        ({"tiers": ["kvlab:///x.sock?serde=cachegen"]}, "a cache server has no tables of models"),
        ({"tiers": ["memory://?serde=int4", "file:///x"]}, "must have the same serde, got naive: what one lost"),
        ({"tiers": ["memory://?serde=int4", "file:///x?serde=int8"]}, "must have the same serde, got int8"),
        ({"tiers": ["memory://?auth=/x"]}, "auth is for the URLs of secondary tiers"),
        (
            {"tiers": ["file:///x?sered=naive"]},
            "known: auth, check, deadline_ms, direct, fsync, policy, serde, shared, size",
        ),
        (
            {"tiers": ["memory://?serde=lossless"]},
            "serde 'lossless' has no fixed size, which slots of host memory need",
        ),
        ({"tiers": ["memory://host/path"]}, "memory:// is this process's memory and has no place"),
        ({"tiers": ["memory://?policy=../x"]}, "unknown eviction policy"),
        ({"load_timeout_ms": "soon"}, "load_timeout_ms must be a number from 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a positive integer"),
        ({"lookup_timeout_ms": -1}, "lookup_timeout_ms must be a number from 0"),
        ({"report": "yes"}, "report must be true or false"),
        ({"min_hit_tokens": 0}, "min_hit_tokens must be an integer >= 1"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, message):
    settings = dict(settings)
    tiers = settings.pop("tiers", ["memory://"])
    with pytest.raises(ConfigError, match=message):
        kvlab.vllm_config(tiers, **settings)


@pytest.mark.parametrize("extra", [None, [], 1, "tiers"])
def test_settings_are_a_dict(extra):
    with pytest.raises(ConfigError, match="kv_connector_extra_config must be a dict of settings"):
        kvlab.connectors.ConnectorConfig.from_extra(extra)


def test_the_dict_is_json_for_the_command_line():
    config = kvlab.vllm_config(["memory://?size=1GiB", "file:///path?size=10GiB"], chunk_tokens=256)
    assert json.loads(json.dumps(config)) == config
    assert config["kv_role"] == "kv_both"


def test_an_unknown_key_stops_the_start(monkeypatch):
    monkeypatch.setattr(kvlab.connectors.ConnectorConfig, "from_extra", classmethod(lambda cls, extra: cls()))
    config = kvlab.vllm_config(["memory://"], tier_policy="lru")
    monkeypatch.undo()
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from tests.connectors.models import short_demo

    with pytest.raises(Exception, match="unknown connector setting 'tier_policy'"):
        LLM(short_demo(), **SETTINGS, kv_transfer_config=KVTransferConfig(**config))


def group(kind, block_size=16, **more):
    from vllm.v1 import kv_cache_interface as kinds

    spec = getattr(kinds, kind)(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32, **more)
    return kinds.KVCacheGroupSpec([f"layer.{kind}.{block_size}"], spec)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64})], "the whole prefix or a sliding window"),
        ([("FullAttentionSpec", {}), ("CrossAttentionSpec", {})], r"has 2 KV cache groups \(FullAttentionSpec, Cross"),
        ([("FullAttentionSpec", {}), ("SlidingWindowSpec", {"sliding_window": 9, "block_size": 32})], r"\[16, 32\]"),
        ([("FullAttentionSpec", {"non_causal": True})], "the whole prefix or a sliding window"),
        ([("RSWASpec", {"rswa_window": 64})], "the whole prefix or a sliding window"),
        ([], "has 0 KV cache groups"),
    ],
)
def test_kinds_of_kv_that_nobody_can_name_are_refused(groups, message):
    from kvlab.connectors.vllm.compat import served_groups

    config = SimpleNamespace(kv_cache_groups=[group(kind, **more) for kind, more in groups])
    with pytest.raises(ConfigError, match=message):
        served_groups(config)


def setup(*, scales=False, drafts=None, ahead=1, in_parallel=False, padded=False, prefixes=True, **parallel):
    """What of vLLM's configuration decides whether it is served."""
    return SimpleNamespace(
        num_prefill_lookahead_tokens=ahead,
        parallel_config=SimpleNamespace(**{"pipeline_parallel_size": 1, **parallel}),
        cache_config=SimpleNamespace(calculate_kv_scales=scales),
        speculative_config=None
        if drafts is None
        else SimpleNamespace(method=drafts, parallel_drafting=in_parallel, disable_padded_drafter_batch=not padded),
        model_config=SimpleNamespace(pooler_config=object(), is_prefix_caching_supported=prefixes),
    )


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"decode_context_parallel_size": 4}, "decode_context_parallel_size must be 1 with KVLabConnector, got 4"),
        ({"scales": True}, "give memory:// as the only tier"),
        ({"drafts": "dflash"}, "by 'dflash' is not served"),
        (
            {"drafts": "medusa"},
            "take ngram or ngram_gpu or suffix or draft_model or eagle or eagle3 or mtp, or",
        ),
        ({"drafts": "mtp", "ahead": 3}, "set num_speculative_tokens to 1, which uses the first"),
        ({"drafts": "eagle", "padded": True}, '"disable_padded_drafter_batch": true in speculative_config'),
        ({"drafts": "eagle3", "in_parallel": True}, "parallel_drafting with 'eagle3' is not served; turn it off"),
        ({"prefixes": False}, "serves no cached prefix of it; run it without the connector"),
    ],
)
def test_setups_that_name_or_copy_kv_wrongly_are_refused(chosen, message):
    from kvlab.connectors.vllm.compat import refuse_unserved

    refuse_unserved(setup(), outlives=True)
    for drafts in ("ngram", "draft_model", "eagle", "eagle3", "mtp"):
        refuse_unserved(setup(drafts=drafts), outlives=True)
        second = setup(drafts=drafts, padded=True)
        second.use_v2_model_runner = True
        refuse_unserved(second, outlives=True)
    with pytest.raises(ConfigError, match=message):
        refuse_unserved(setup(**chosen), outlives=True)


def stages(num_layers, num_stages, *groups):
    """A vLLM configuration, and the KV cache configuration of a rank whose groups have these bytes for each layer."""
    vllm_config = setup(pipeline_parallel_size=num_stages)
    vllm_config.model_config.get_total_num_hidden_layers = lambda: num_layers
    found = [
        SimpleNamespace(
            kv_cache_spec=SimpleNamespace(
                kv_cache_specs={f"l{at}": SimpleNamespace(page_size_bytes=size) for at, size in enumerate(sizes)}
            ),
            layer_names=[f"l{at}" for at in range(len(sizes))],
        )
        for sizes in groups
    ]
    return vllm_config, SimpleNamespace(kv_cache_groups=found)


def test_stages_of_other_sizes_count_the_same_slots(monkeypatch):
    from kvlab.connectors.vllm.compat import slot_bytes

    assert slot_bytes(*stages(3, 1, [10, 10, 30])) == 50
    assert slot_bytes(*stages(5, 2, [10] * 3)) == slot_bytes(*stages(5, 2, [10] * 2)) == 30
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,4")
    assert slot_bytes(*stages(5, 2, [10])) == 40


@pytest.mark.parametrize("groups", [([10, 20],), ([10] * 2, [10]), ([10] * 4,)], ids=["sizes", "groups", "few"])
def test_stages_whose_layers_differ_are_refused(groups):
    from kvlab.connectors.vllm.compat import slot_bytes

    with pytest.raises(ConfigError, match="set pipeline_parallel_size to 1 and use tensor parallelism"):
        slot_bytes(*stages(6, 2, *groups))


def test_scales_measured_in_the_process_are_no_matter_to_its_own_memory():
    from kvlab.connectors.vllm.compat import refuse_unserved

    refuse_unserved(setup(scales=True), outlives=False)


def test_windows_are_those_the_engine_states():
    from kvlab.connectors.vllm.compat import served_groups

    groups = [group("SlidingWindowSpec", sliding_window=80), group("FullAttentionSpec", sliding_window=80)]
    assert served_groups(SimpleNamespace(kv_cache_groups=groups)).windows == (80, None)
