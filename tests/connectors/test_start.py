"""An engine that cannot start says why in kvlab's own line."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_the_last_error_above_vllms_own_is_kvlabs(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "engine.py"  # a file: vLLM starts its processes from it
    script.write_text(ENGINE)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=env, cwd=root, timeout=280, check=False
    )
    assert out.returncode != 0
    told = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): .*$", out.stdout + out.stderr, re.MULTILINE)
    *before, last = told
    assert "Engine core initialization failed" in last
    assert "unknown connector setting 'chunk_size'; known: tiers, chunk_tokens" in before[-1]


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
