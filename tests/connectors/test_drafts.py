"""A draft model under a real engine: its KV follows from the tokens, and objects hold it beside the model's own."""

from types import SimpleNamespace

import pytest

import kvlab
from kvlab.connectors.vllm.weights import draft_name
from tests.connectors.engine import MAX_TOKENS, connector, core, drain, engine, generate, prompt, worker
from tests.connectors.models import KEPT, short_demo
from tests.connectors.test_attach import answer, zeroed

DRAFTED = 3  # by step
NAMES = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


@pytest.fixture(scope="module")
def settings() -> dict:
    """The model drafts for itself: nearly all drafts are accepted, while the draft's KV is right."""
    speculative = {"method": "draft_model", "model": short_demo(), "num_speculative_tokens": DRAFTED}
    return {"speculative_config": speculative, "disable_log_stats": False, "max_model_len": 768}


def drafts(llm) -> dict[str, int]:
    counted = {m.name.removeprefix("vllm:spec_decode_"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return {name: int(counted.get(name, 0)) for name in NAMES}


def ask(llm, p):
    """The answer, and the share of drafts that was accepted for it."""
    before = drafts(llm)
    found = generate(llm, [p], max_tokens=4 * MAX_TOKENS)[0]
    counts = {name: count - before[name] for name, count in drafts(llm).items()}
    assert counts["num_draft_tokens"]
    return found, counts["num_accepted_tokens"] / counts["num_draft_tokens"]


def test_as_many_drafts_are_accepted_after_a_hit(settings, tmp_path):
    prompts = [prompt(n) for n in (100, 300, 480)]  # a hit leaves more than one token: else vLLM pads with drafts
    with engine(None, settings) as llm:
        right = [ask(llm, p) for p in prompts]
    assert min(share for _, share in right) > 0.9
    tiers = [f"file://{tmp_path}?size=1GiB"]
    with engine(["memory://?size=64MiB", *tiers], settings) as llm:
        for p, (expected, share) in zip(prompts, right, strict=True):
            for _ in range(2):
                found, accepted = ask(llm, p)
                assert (found.tokens, accepted) == (expected.tokens, share)
            assert found.hit == (len(p) - 1) // 32 * 32
        drain(llm)
        original = worker(llm).transfer.load
        layout = worker(llm).transfer.layout
        own = [at for at, name in enumerate(layout.layer_names) if not name.startswith("draft_model.")]
        assert 0 < len(own) < layout.num_layers

        def load(slots, pages, num_tokens=()):
            original(slots, pages)
            for at, layer in enumerate(layout.pages):
                if at not in own:
                    layer[list(pages)] = 0

        worker(llm).transfer.load = load
        found, accepted = ask(llm, prompts[-1])
        assert (found.hit, found.tokens) == (448, right[-1][0].tokens)  # the answer never depends on drafts
        assert accepted < right[-1][1]
        assert not connector(llm).hook_errors
    with engine(tiers, settings) as llm:
        found, accepted = ask(llm, prompts[-1])
        assert (found.hit, found.row["tier"]) == (448, "disk")
        assert (found.tokens, accepted) == (right[-1][0].tokens, right[-1][1])
        assert core(llm).num_spec_tokens == DRAFTED
        cache = kvlab.attach(llm)
        kv = cache.read(prompts[-1])
        assert (kv.num_layers, kv.num_positions) == (len(KEPT), 480)
        asked, p = cache.write(prompts[-1], kv), prompts[-1]
        assert answer(llm, asked, 4 * MAX_TOKENS) == (right[-1][0].tokens, 479)  # the draft has no KV, and loses
        other, cached = answer(llm, cache.write(p, zeroed(kv, 2)), 4 * MAX_TOKENS)
        assert (other == right[-1][0].tokens, cached) == (False, 479)
        assert ask(llm, p)[0].tokens == right[-1][0].tokens
        assert not connector(llm).hook_errors


def test_a_draft_model_is_named_by_its_files(tmp_path):
    def config(model):
        draft = SimpleNamespace(
            model=str(model), revision=None, dtype="float32", quantization=None, hf_config=None, model_weights=""
        )
        load = SimpleNamespace(load_format="auto", model_loader_extra_config={}, download_dir=None)
        return SimpleNamespace(
            speculative_config=SimpleNamespace(draft_model_config=draft, draft_load_config=None), load_config=load
        )

    same = {draft_name(config(short_demo()), outlives=True) for _ in range(2)}
    assert len(same) == 1
    assert draft_name(config("s3://there"), outlives=True) == "s3://there@None/float32/None"
    assert draft_name(config("s3://there"), outlives=False) not in same
