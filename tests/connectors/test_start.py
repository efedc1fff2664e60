"""An engine that cannot start says why in kvlab's own line."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvlab.connectors import vllm_plugin
from kvlab.connectors.vllm import KVLabConnector, compat
from kvlab.errors import ConfigError

ENGINE = """
from vllm import LLM
from vllm.config import KVTransferConfig
from tests.connectors.engine import SETTINGS
from tests.connectors.models import short_demo

if __name__ == "__main__":
    transfer = KVTransferConfig(
        kv_connector="KVLabConnector", kv_connector_module_path="kvlab.connectors.vllm", kv_role="kv_both",
        kv_connector_extra_config={"tiers": ["memory://?size=64MiB"], "chunk_size": 64},
    )
    LLM(short_demo(), **SETTINGS, kv_transfer_config=transfer)
"""


def test_a_wrong_setting_is_the_last_line_before_an_engine_starts(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "engine.py"  # a file: vLLM starts its processes from it
    script.write_text(ENGINE)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=env, cwd=root, timeout=280, check=False
    )
    assert out.returncode != 0
    told = out.stderr.strip().splitlines()[-1]
    assert told.startswith(
        "kvlab.errors.ConfigError: unknown connector setting 'chunk_size'; known: tiers, chunk_tokens"
    )
    assert "Engine core initialization failed" not in out.stdout + out.stderr


def test_settings_among_those_of_several_connectors_are_checked():
    ours = {"kv_connector_module_path": "kvlab.connectors.vllm", "kv_connector_extra_config": {"tiers": []}}
    several = SimpleNamespace(kv_connector_module_path=None, kv_connector_extra_config={"connectors": [{}, ours]})
    with pytest.raises(ConfigError, match="tiers must be a list"):
        vllm_plugin._check_settings(several)
    for others in (None, SimpleNamespace(kv_connector_module_path="another", kv_connector_extra_config={"tiers": 1})):
        vllm_plugin._check_settings(others)


def test_a_wrong_setting_is_told_in_the_process_that_the_user_started():
    """vLLM asks this while it reads its arguments, where CUDA graphs are on."""
    with pytest.raises(ConfigError, match="unknown connector setting 'chunk_size'"):
        KVLabConnector.requires_piecewise_for_cudagraph({"tiers": ["memory://?size=64MiB"], "chunk_size": 64})
    assert KVLabConnector.requires_piecewise_for_cudagraph({"tiers": ["memory://?size=64MiB"]}) is False


def test_the_layout_is_asked_for_where_no_worker_lives(monkeypatch):
    """The scheduler of several ranks has none in its process, and vLLM 0.26 asks for the configuration that is set."""
    from vllm.config import VllmConfig, get_current_vllm_config
    from vllm.v1.attention.backends import utils

    config = VllmConfig()
    monkeypatch.setattr(config.cache_config, "kv_cache_layout", None, raising=False)
    layouts = {id(config): "NHD"}
    monkeypatch.setattr(utils, "get_kv_cache_layout", lambda: layouts[id(get_current_vllm_config())], raising=False)
    assert compat.layout_name(config, SimpleNamespace(kv_cache_layout=None)) == "NHD"
