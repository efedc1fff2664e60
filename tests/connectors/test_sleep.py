"""Sleep mode: pages and weights go away while nothing is computed. No object holds what was in pages afterwards, and
nothing of other weights is served.

vLLM's CPU build knows the calls and frees nothing, so here the worker's part is done by hand: pages are overwritten,
and at level 2 weights too. benchmarks/gpu_sleep.py asks the same of a GPU.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.connectors.damage import GARBAGE
from tests.connectors.engine import connector, drain, engine, generate, prompt, worker
from tests.connectors.models import short_demo
from tests.connectors.test_weights import waits_for_a_load

PROMPT = prompt(300)


def sleeps(llm, monkeypatch) -> None:
    """Let the worker lose what a GPU's loses."""

    def sleep(level: int = 1) -> None:
        for pages in worker(llm).transfer.layout.pages:
            pages.fill_(GARBAGE)
        if level == 2:
            with torch.no_grad():
                for name, weights in driver(llm).model_runner.model.named_parameters():
                    if "layernorm" in name:  # linear layers run from packed copies on a CPU
                        weights.fill_(7)

    monkeypatch.setattr(driver(llm).worker, "sleep", sleep)


def driver(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker


def other_weights(folder: Path) -> str:
    """The demo model with a trainer's norms."""
    shutil.copytree(short_demo(), folder)
    rng = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(name for name in tensors if "layernorm" in name):
        noise = 1 + 0.5 * torch.randn(tensors[name].shape, generator=rng)
        tensors[name] = (tensors[name].float() * noise).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_an_engine_that_slept_serves_and_stores_what_it_computes_now(tmp_path, expected, monkeypatch):
    tiers = ["memory://?size=256MiB", f"file://{tmp_path}/tier?size=1GiB"]
    changed = other_weights(tmp_path / "changed")
    with engine(None, {"model": changed}) as llm:
        right = generate(llm, [PROMPT])[0].tokens
    assert right != expected(PROMPT)
    with engine(tiers) as llm:
        sleeps(llm, monkeypatch)
        assert generate(llm, [PROMPT])[0].tokens == expected(PROMPT)
        llm.sleep(1)  # what was saved may still be under way
        llm.wake_up()
        for hit in (0, 299):
            found = generate(llm, [PROMPT])[0]
            assert (found.hit, found.tokens) == (hit, expected(PROMPT))
            drain(llm)
        llm.sleep(2)
        llm.wake_up()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": changed})
        for hit in (0, 299):
            found = generate(llm, [PROMPT])[0]
            assert (found.hit, found.tokens) == (hit, right)
            drain(llm)
        assert not connector(llm).hook_errors
    with engine(tiers) as llm:  # with the folder's weights again
        found = generate(llm, [PROMPT])[0]
        assert (found.hit, found.tokens) == (299, expected(PROMPT)), "stored before it slept"


def test_an_engine_does_not_fall_asleep_over_a_load(tmp_path, expected, monkeypatch):
    with engine(["memory://?size=256MiB", f"file://{tmp_path}?size=1GiB"]) as llm:
        lost = []
        monkeypatch.setattr(driver(llm).worker, "sleep", lambda level=1: lost.append(level))
        generate(llm, [PROMPT])
        drain(llm)
        waits_for_a_load(llm)
        llm.llm_engine.abort_request(["waits"])  # its pages are still being filled
        with pytest.raises(RuntimeError, match="Failed to reset KV cache"):
            llm.sleep(1)
        assert not lost
        llm.wake_up()
        assert generate(llm, [PROMPT])[0].tokens == expected(PROMPT)
        llm.sleep(1)
        assert lost == [1]
        assert not connector(llm).hook_errors
