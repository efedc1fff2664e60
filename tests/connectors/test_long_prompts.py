"""A long prompt: hits from memory and from a disk, and what a step, a question and an answer hold of it.

32k tokens here; KVLAB_LONG_TOKENS=131072 takes a minute more, most of it to compute the prompt.
"""

import os
import pickle
import random
from contextlib import contextmanager

import torch

from tests.connectors.engine import BLOCK, connector, drain, empty_memory, engine, generate, worker

NUM_TOKENS = int(os.environ.get("KVLAB_LONG_TOKENS", 32 << 10))
CHUNK, STEP_TOKENS = 256, 8192
NUM_BLOCKS = NUM_TOKENS // BLOCK
HEAD = 32
PAGE_BYTES = BLOCK * 2 * HEAD * 4  # one layer of one KV head


def model(folder) -> str:
    """One layer, so that computing the prompt is cheap, without which no hit can be judged."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=HEAD, max_position_embeddings=NUM_TOKENS + 64, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@contextmanager
def watched(llm):
    """The bytes of each step's metadata, of each question, and the keys that the tiers were asked for."""
    scheduler, steps, questions = connector(llm).scheduler, [], []
    build, ask = scheduler.build, scheduler.tiers.ask

    def build_and_weigh(output):
        metadata = build(output)
        steps.append(len(pickle.dumps(metadata)))
        return metadata

    def ask_and_count(message, data, answered):
        def count(found, flags):
            questions.append((len(data), sum(flag > 0 for flag in flags)))
            answered(found, flags)

        ask(message, data, count)

    scheduler.build, scheduler.tiers.ask = build_and_weigh, ask_and_count
    try:
        yield steps, questions
    finally:
        del scheduler.build, scheduler.tiers.ask


def test_a_long_prompt_is_found_in_every_tier(tmp_path):
    settings = {
        "model": model(tmp_path / "model"), "max_model_len": NUM_TOKENS + 64, "max_num_batched_tokens": STEP_TOKENS,
        "kv_cache_memory_bytes": (NUM_BLOCKS + 16) * PAGE_BYTES, "max_num_seqs": 2,
    }  # fmt: skip
    p = random.Random(0).choices(range(512), k=NUM_TOKENS)
    tiers = ["memory://?size=64MiB", f"file://{tmp_path}/tier?size=1GiB"]
    with engine(tiers, settings, chunk_tokens=CHUNK) as llm:
        with watched(llm) as (steps, questions):
            right = generate(llm, [p])[0]
        assert right.hit == 0
        assert len(set(right.tokens)) > 2
        assert questions == [(17 * NUM_BLOCKS, NUM_TOKENS // CHUNK + CHUNK // BLOCK - 1)]  # its chunks, then tails
        assert max(steps) < 32 * STEP_TOKENS // BLOCK, "a step's saves are those of its own tokens"
        drain(llm)
        for tier in ("memory", "disk"):
            with watched(llm) as (steps, questions):
                found = generate(llm, [p])[0]
            assert (found.tokens, found.hit, found.row["tier"]) == (right.tokens, NUM_TOKENS - 1, tier)
            assert sum(asked for _, asked in questions) <= NUM_TOKENS // CHUNK
            assert max(steps) < 32 * NUM_BLOCKS
            drain(llm)
            empty_memory(llm)
        half = p[: NUM_TOKENS // 2] + p[::-1][: NUM_TOKENS // 2]  # turns away in the middle
        with watched(llm) as (_, questions):
            found = generate(llm, [half], max_tokens=1)[0]
        assert (found.hit, found.row["tier"]) == (NUM_TOKENS // 2, "disk")
        assert sum(asked for _, asked in questions) <= NUM_TOKENS // CHUNK + CHUNK // BLOCK
        assert not connector(llm).hook_errors
        assert not worker(llm).tiers.counters
