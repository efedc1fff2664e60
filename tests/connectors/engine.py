"""A real vLLM in this process, with and without kvlab, on a short demo model; prompts of its tokens."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import kvlab
from kvlab.datasets.demo_model import demo_model
from kvlab.judge.engine import core, running
from kvlab.stores.wrappers import LatencyStore
from tests.connectors.models import TOKEN_BYTES, short_demo
from tests.support.starts import check_may_start
from tests.support.tiers import workers_in_threads

BLOCK = 32
MAX_TOKENS = 8
# Float32: in bfloat16 another batch composition flips near-ties by itself.
SETTINGS = {
    "enforce_eager": "KVLAB_TEST_GRAPHS" not in os.environ,  # CUDA graphs cost minutes of compilation
    "distributed_executor_backend": "uni",
    "kv_cache_memory_bytes": 112 * BLOCK * TOKEN_BYTES,
    # Must be free at the start, though the line above says what is used. On a CPU another engine may run beside.
    "gpu_memory_utilization": 0.3 if torch.cuda.is_available() else 0.15,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "dtype": "float32",
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,  # prompts are tokens; vLLM copies a tokenizer for half a second, a third of a start
}


# On a busy machine a load may really be slower than a recompute, and a tier's answer late: misses, rightly.
PATIENT = {"admission": False, "lookup_timeout_ms": 60_000, "load_timeout_ms": 120_000}


@dataclass
class Answer:
    """Greedy tokens of one request and kvlab's row about it."""

    tokens: list[int]
    row: dict[str, Any]

    @property
    def hit(self) -> int:
        return int(self.row.get("hit_tokens", 0))


@contextmanager
def engine(
    tiers: Sequence[str] | None, settings: dict[str, Any] | None = None, *, in_thread: bool = False, **connector: Any
) -> Iterator[Any]:
    """An `LLM` with these tiers (None: no connector), shut down at the end. `in_thread`: its tier worker is a thread,
    see `objects_of`."""
    check_may_start("engine")
    close_shared()
    arguments = {**SETTINGS, **(settings or {})}
    model = arguments.pop("model", None) or short_demo()
    chosen = {"report": True, "chunk_tokens": 64, **PATIENT, **connector}
    transfer = None if tiers is None else kvlab.vllm_config(tiers, **chosen)
    with workers_in_threads() if in_thread else nullcontext(), running(model, arguments, transfer) as llm:
        yield llm


_shared: dict[tuple[str, ...], tuple[Any, ExitStack]] = {}


def shared(*tiers: str) -> Any:
    """An engine kept between tests. vLLM keeps its connector in a global: two engines never live at once."""
    if tiers not in _shared:
        stack = ExitStack()
        llm = stack.enter_context(engine(tiers))
        _shared[tiers] = (llm, stack)
    return _shared[tiers][0]


def close_shared() -> None:
    for _, stack in list(_shared.values()):
        stack.close()
    _shared.clear()


def connector(llm: Any) -> Any:
    """The scheduler side's KVLabConnector."""
    return core(llm).connector


def empty_memory(llm: Any) -> None:
    """The memory tier holds nothing any more; secondary tiers stay as they are."""
    connector(llm).scheduler.index.clear()


def worker(llm: Any) -> Any:
    """The worker side's Worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


def objects_of(llm: Any) -> Any:
    """The `PageObjects` of a tier worker that is a thread; its `store` may be replaced."""
    return worker(llm).tiers._worker.server.objects


def generate(llm: Any, prompts: Sequence[Sequence[int]], *, salt: str | None = None, **params: Any) -> list[Answer]:
    from vllm import SamplingParams

    sampling = SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **params})
    inputs = [{"prompt_token_ids": list(p), **({"cache_salt": salt} if salt else {})} for p in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    return [Answer(list(o.outputs[0].token_ids), (o.kv_transfer_params or {}).get("kvlab", {})) for o in outputs]


@cache
def text_ids() -> tuple[int, ...]:
    from transformers import AutoTokenizer

    facts = " ".join(f"Fact {i}: item {i * 7 % 13} costs {i * i} coins and weighs {i % 5} stones." for i in range(60))
    return tuple(AutoTokenizer.from_pretrained(demo_model()).encode(facts))


def prompt(length: int, *, ending: int | None = None) -> list[int]:
    """`length` tokens of the text; with `ending`, the last 20 are others."""
    ids = list(text_ids()[:length])
    if ending is not None:
        ids[-20:] = text_ids()[500 + 20 * ending : 520 + 20 * ending]
    return ids


def drain(llm: Any) -> None:
    """Wait until what was saved is in the tier, and let the scheduler hear of it."""
    tiers, deadline = worker(llm).tiers, time.monotonic() + 120
    while tiers is not None and tiers.has_waiting:
        assert time.monotonic() < deadline
        tiers.wait(0.05)
        tiers.poll()
    worker(llm).poll()
    report = worker(llm).take_report()
    if report is not None:
        connector(llm).scheduler.absorb(report)


def check_loads_under_eviction(llm: Any, ask: Callable[..., list[Answer]], expected: Callable[..., list[int]]) -> None:
    """Over a slow tier, in an engine whose host memory holds a few prompts: objects leave while others are fetched."""
    prompts = [prompt(300), prompt(300, ending=0), prompt(200, ending=1), prompt(480), prompt(480, ending=0)]
    objects_of(llm).store = LatencyStore(objects_of(llm).store, latency_s=0.01)
    for _ in range(3):
        assert [answer.tokens for answer in ask(llm, *prompts)] == [expected(p) for p in prompts]
        drain(llm)
    scheduler = connector(llm).scheduler
    assert scheduler.index.num_evictions
    assert scheduler.counters["hit_requests"]
    assert not scheduler.index.num_leased_slots
    assert not connector(llm).hook_errors
