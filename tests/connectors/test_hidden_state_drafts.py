"""EAGLE and MTP under a real engine: a draft's KV of a token follows from the next token too, as does its name."""

import numpy as np
import pytest

import kvlab
from kvlab.container import unpack
from kvlab.errors import ConfigError
from kvlab.stores import open_store
from tests.connectors import hidden_state_drafts
from tests.connectors.engine import connector, drain, empty_memory, engine, prompt, worker
from tests.connectors.test_drafts import DRAFTED, ask

FORK = 128  # the end of two chunks
NUM_TOKENS = 300
GENERATED = 30  # of the answer, which fill a block


def objects(url: str) -> dict[str, np.ndarray]:
    """What a tier holds: key -> blocks, layers, floats of a page."""
    with open_store(url) as store:
        parts = {key: unpack(store.get(key), key).parts["payload"] for key in list(store.keys())}
    return {
        key: np.frombuffer(part.data, np.float32).reshape(*part.shape[:2], -1).copy() for key, part in parts.items()
    }


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_drafts_find_their_kv_after_a_hit(kind, tmp_path):
    settings = getattr(hidden_state_drafts, kind)(tmp_path / "model")
    # Padded batches have a wrong next token at the end of each part of a prompt, on a CPU's model runner.
    settings["speculative_config"] |= {"num_speculative_tokens": DRAFTED, "disable_padded_drafter_batch": True}
    settings |= {"disable_log_stats": False, "max_model_len": 768, "kv_cache_memory_bytes": 16 << 20}
    p = prompt(NUM_TOKENS)
    fork = [*p[:FORK], *prompt(NUM_TOKENS + 50)[FORK + 50 :]]
    with engine(None, settings) as llm:
        right, share = ask(llm, p)
        longer = p + right.tokens[:GENERATED]
        more, share_of_more = ask(llm, longer)
    assert min(share, share_of_more) > 0.3, "a draft that is never right would prove nothing"
    assert len(set(right.tokens)) > 8
    alone, beside = (f"file://{tmp_path / name}?size=1GiB" for name in ("alone", "beside"))
    host = "memory://?size=64MiB"
    with engine([host, alone], settings, save_generated=True) as llm:
        found, accepted = ask(llm, p)
        assert (found.hit, found.tokens, accepted) == (0, right.tokens, share)
        drain(llm)
        assert not connector(llm).hook_errors
    in_parts = {"max_num_batched_tokens": 96, "max_num_seqs": 4}  # a prompt's steps end with blocks
    with engine([host, beside], settings | in_parts) as llm:
        ask(llm, fork)
        found, accepted = ask(llm, longer)
        assert (found.tokens, accepted) == (more.tokens, share_of_more)
        assert found.hit == FORK - 64, "the chunk that ends at the fork has KV of the other prompt's next token"
        drain(llm)
        for tier in ("memory", "disk"):
            found, accepted = ask(llm, longer)
            assert (found.hit, found.row["tier"]) == (320, tier)
            assert (found.tokens, accepted) == (more.tokens, share_of_more)
            empty_memory(llm)
        with pytest.raises(ConfigError, match="draft model cannot be told from the model's own"):
            kvlab.attach(llm)
        original, pages = worker(llm).transfer.load, worker(llm).transfer.layout.pages
        num_own = {"eagle": 2, "mtp": 1}[kind]

        def load(slots, blocks, num_tokens=()):
            original(slots, blocks)
            for layer in pages[num_own:]:
                layer[list(blocks)] = 0

        worker(llm).transfer.load = load
        found, accepted = ask(llm, longer)
        assert (found.hit, found.tokens) == (320, more.tokens)  # the answer never depends on drafts
        assert accepted < share_of_more
        assert not connector(llm).hook_errors
    # Objects of one name are the same: of a prompt alone with its answer, and of both as a prompt beside another one.
    ours, theirs = objects(alone), objects(beside)
    both = ours.keys() & theirs.keys()
    assert len(both) == NUM_TOKENS // 64 + 1, "the last with tokens that were generated"
    for key in both:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4)
