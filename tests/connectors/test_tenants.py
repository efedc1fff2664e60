"""Only what an object names leaves the engine: its own tokens' KV, and zeros."""

import json

import pytest
import torch

from kvlab.stores.memory import MemoryStore
from kvlab.stores.wrappers import WrapperStore
from tests.connectors.damage import GARBAGE, overwritten
from tests.connectors.engine import BLOCK, connector, drain, engine, generate, objects_of, prompt, text_ids, worker
from tests.connectors.models import TOKEN_BYTES, gemma

MARKER = bytes([GARBAGE]) * 16  # what `overwritten` leaves in pages that were freed, four floats of it
LENGTHS = [2, 3, 5, 31, 33, 40, 63, 65, 100, 129, 150, 200]


class Seen(WrapperStore):
    """Keeps a copy of all that a tier is given."""

    def __init__(self, inner):
        super().__init__(inner)
        self.values = {}

    def put(self, key, value):
        pieces = [value] if isinstance(value, bytes | bytearray | memoryview) else value
        self.values[key] = b"".join(bytes(ref) for ref in pieces)
        return super().put(key, value)


def tenants():
    """Prompts of any length under salts of their own, eight at a time, so that pages go round."""
    texts = [[list(text_ids()[31 * at : 31 * at + n]) for at, n in enumerate(LENGTHS)], [prompt(n) for n in LENGTHS]]
    for turn in range(3):
        for number, prompts in enumerate(texts):
            yield prompts[turn:] + prompts[:turn], f"tenant {number}"


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["", "prefix-caching"])
@pytest.mark.parametrize("kind", ["demo", "gemma"])
def test_nothing_that_others_left_in_a_page_is_stored(kind, prefix_caching, tmp_path):
    """Every page is full of a marker before the first request, and freed pages are again at once."""
    settings = {"kv_cache_memory_bytes": 24 * BLOCK * TOKEN_BYTES, "max_model_len": 256}
    if kind == "gemma":  # four groups, of which one has one layer, the others two: its pages have room for two
        layers = ["sliding_attention"] * 5 + ["full_attention"] * 2
        settings = {**gemma(tmp_path, layers), "kv_cache_memory_bytes": 4 << 20, "max_model_len": 256}
    settings |= {"enable_prefix_caching": prefix_caching, "max_num_batched_tokens": 64, "enable_chunked_prefill": True}
    with engine(["memory://?size=64MiB", f"file://{tmp_path}/kv?size=1GiB"], settings, in_thread=True) as llm:
        ours, pages = worker(llm), worker(llm).transfer.layout.pages
        objects_of(llm).store = seen = Seen(MemoryStore(1 << 30))
        for layer in pages:
            layer.fill_(GARBAGE)
        with overwritten(llm) as freed:
            for prompts, salt in tenants():
                generate(llm, prompts, salt=salt, max_tokens=5, detokenize=False)
            drain(llm)
        assert len(freed) > 100
        assert any(bytes(layer.cpu().numpy()).find(MARKER) >= 0 for layer in pages)
        assert len(seen.values) > 30
        for key, value in seen.values.items():
            assert value.find(MARKER) < 0, f"object {key} holds what another request left in a page"
        assert bytes(ours.transfer.arena.numpy()).find(MARKER) < 0
        if kind == "demo":
            for value in seen.values.values():
                check_number_of_words(value)
        assert not connector(llm).hook_errors


def check_number_of_words(value: bytes) -> None:
    """As many as its tokens have: no generated token's either, which would be written behind them."""
    size = int.from_bytes(value[:8], "little")
    metadata = json.loads(value[8 : 8 + size])["__metadata__"]
    data = torch.frombuffer(bytearray(value[8 + size :]), dtype=torch.float32)
    num_tokens = int(metadata["end_token"]) - int(metadata["first_token"])
    per_token = TOKEN_BYTES // 4
    found = int(torch.count_nonzero(data))
    assert 0.99 * num_tokens * per_token <= found <= num_tokens * per_token
