"""Connector settings are checked before an engine starts."""

import json

import pytest

import kvlab
from kvlab.errors import ConfigError
from tests.connectors.engine import SETTINGS, engine


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
        ({"chunk_tokens": 0}, "chunk_tokens must be a positive integer"),
        ({"lookup_timeout_ms": -1}, "lookup_timeout_ms must be a number >= 0"),
        ({"report": "yes"}, "report must be true or false"),
        ({"min_hit_tokens": 0}, "min_hit_tokens must be an integer >= 1"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, message):
    settings = dict(settings)
    tiers = settings.pop("tiers", ["memory://"])
    with pytest.raises(ConfigError, match=message):
        kvlab.vllm_config(tiers, **settings)


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

    from kvlab.bench.demo_model import demo_model

    with pytest.raises(Exception, match="unknown connector setting 'tier_policy'"):
        LLM(demo_model(), **SETTINGS, kv_transfer_config=KVTransferConfig(**config))


def test_a_model_with_several_groups_is_refused_at_start(tmp_path):
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, sliding_window=64, vocab_size=256, max_position_embeddings=512,
        architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 256}
    with pytest.raises(Exception, match=r"has \d KV cache groups \(Sliding"), engine(["memory://"], settings):
        pass
