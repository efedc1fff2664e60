"""One vLLM engine in this process, started and ended; and what of it traps look at.

The only module of the judge that imports vLLM.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvlab.errors import missing_package

GARBAGE = 13323083.0  # finite, so that it can hide behind no mask; as float32 its bytes are equal
ENVIRONMENT = {  # of a process that is to hold an engine; one thread, as several wait for each other on a busy machine
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@cache
def freeze_imports() -> None:
    """Collections before, in and after each engine pass over what is there now, which are mostly vLLM's modules: two
    seconds an engine instead of six. vLLM itself freezes and thaws the whole heap with each engine."""
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


@cache
def bind_kernels_once() -> None:
    """vLLM for CPUs looks through all modules, a quarter of a start, to bind its kernels; with each engine anew, though
    what the first one bound stays, for modules that are imported later too."""
    from vllm.platforms import current_platform

    if register := getattr(current_platform, "register_triton_kernel_overrides", None):
        current_platform.register_triton_kernel_overrides = cache(register)


@contextmanager
def running(model: str, arguments: Mapping[str, Any], transfer: Mapping[str, Any] | None) -> Iterator[Any]:
    """vLLM's ``LLM`` with the connector that `transfer` names (None: without one), shut down at the end."""
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    try:
        from vllm import LLM
        from vllm.config import KVTransferConfig
        from vllm.distributed import cleanup_dist_env_and_memory
    except ImportError as error:
        raise missing_package(error, "an engine") from error
    freeze_imports()
    bind_kernels_once()
    gc.collect()  # the last engine: its user has let go of it only now, and vLLM must see no memory come free at start
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    more = {} if transfer is None else {"kv_transfer_config": KVTransferConfig(**transfer)}
    llm = None
    try:
        llm = LLM(model, **{**arguments, **more})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def versions() -> str:
    """Of vLLM and torch, for a report."""
    import vllm

    return f"vllm {vllm.__version__}; torch {torch.__version__}"


def core(llm: Any) -> Any:
    """vLLM's scheduler of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def adapter(number: int, path: str) -> Any:
    """vLLM's request for a LoRA adapter; 0 is none."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{number}", number, path) if number else None


def sampling(**parameters: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False, **parameters})


def pages_of(llm: Any) -> Callable[[int], Sequence[torch.Tensor]]:
    """Gives the pages of a block, one tensor a layer, over the engine's own memory."""
    num_blocks = core(llm).kv_cache_manager.block_pool.num_gpu_blocks
    caches = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.kv_caches

    split = [cache for layer in caches for cache in ((layer,) if layer.shape[0] % num_blocks == 0 else layer)]

    def of_block(block: int) -> list[torch.Tensor]:
        found = []
        for layer in split:
            rows = layer.shape[0] // num_blocks  # an engine may split a block of its tables into several rows
            found.append(layer[block * rows : (block + 1) * rows])
        return found

    return of_block


@contextmanager
def overwritten(
    llm: Any,
    *,
    when_freed: bool = True,
    pages: Callable[[int], Iterable[torch.Tensor]] | None = None,
    garbage: float = GARBAGE,
) -> Iterator[list[int]]:
    """Pages (those of the engine's KV caches, or `pages` of a block's id) are filled with garbage when the engine
    allocates them, and `when_freed`, before anything else happens; gives the list of the freed ones. A freed page that
    the prefix cache still finds keeps its KV until it is allocated: a request may read it."""
    pool, of_block = core(llm).kv_cache_manager.block_pool, pages or pages_of(llm)
    seen: list[int] = []
    originals = pool.free_blocks, pool.get_new_blocks

    def fill(block: Any) -> None:
        for page in of_block(block.block_id):
            page.fill_(garbage)

    def free_blocks(ordered_blocks: Any) -> None:
        blocks = list(ordered_blocks)
        originals[0](blocks)
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                seen.append(block.block_id)
                if when_freed and block.block_hash is None:
                    fill(block)

    def get_new_blocks(num_blocks: int, *args: Any, **kwargs: Any) -> Any:
        blocks = originals[1](num_blocks, *args, **kwargs)
        for block in blocks:
            fill(block)
        return blocks

    pool.free_blocks, pool.get_new_blocks = free_blocks, get_new_blocks
    try:
        yield seen
    finally:
        pool.free_blocks, pool.get_new_blocks = originals


@contextmanager
def preemptions(llm: Any) -> Iterator[list[str]]:
    """Gives the list of requests that the scheduler preempts."""
    scheduler, seen = core(llm), []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    try:
        yield seen
    finally:
        scheduler._preempt_request = original
