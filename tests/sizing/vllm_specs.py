"""Run in a process of its own: what vLLM itself says of models built on the meta device. Prints one JSON line each.

Arguments: a JSON list of [name, config]. The first must be a mixture of experts, or none may be: the expert group is
made with the first model. No weights, no engine, no accelerator.
"""

import json
import os
import sys
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_capacity,
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import MambaSpec

MEMORY, TOKENS = 80 << 30, 8192

# vLLM looks at a model's class in a fresh process, so as not to start CUDA in this one; there is none here.
registry._run_in_subprocess = lambda fn: fn()


def ask(name: str, config: dict, folder: str) -> dict:
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)
    args = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        load_format="dummy",
        kv_cache_memory_bytes=1 << 30,
        distributed_executor_backend="uni",
        max_model_len=TOKENS,
        dtype="bfloat16",
    )
    vllm_config = args.create_engine_config()
    cache = vllm_config.cache_config
    with set_current_vllm_config(vllm_config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            initialize_model(vllm_config=vllm_config)
        first_block = cache.block_size
        current_platform.update_block_size_for_backend(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        specs = {key: layer.get_kv_cache_spec(vllm_config) for key, layer in layers.items()}
        specs = {key: spec for key, spec in specs.items() if spec is not None}
        cache.kv_cache_layout = "LBNHC"
        config = get_kv_cache_config_from_groups(vllm_config, get_kv_cache_groups(vllm_config, specs), MEMORY)
        capacity, sequences = get_kv_cache_capacity(vllm_config, config)
    states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    return {
        "name": name,
        "layers": [
            {
                "spec": type(spec).__name__,
                "token_bytes": 0 if isinstance(spec, MambaSpec) else spec.unpadded_page_size_bytes // spec.block_size,
                "state_bytes": spec.state_content_size_bytes if isinstance(spec, MambaSpec) else 0,
                "window": getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None),
            }
            for spec in specs.values()
        ],
        "engine": {
            "block_size": first_block,
            "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
            "max_concurrent_batches": vllm_config.max_concurrent_batches,
            "mamba_cache_mode": cache.mamba_cache_mode if states else "none",
        },
        "aligned_block_size": cache.block_size,
        "num_blocks": config.num_blocks,
        "groups": sorted(len(group.layer_names) for group in config.kv_cache_groups),
        "capacity_tokens": capacity,
        "sequences": sequences,
    }


def main() -> None:
    for name, config in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(ask(name, config, folder)), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
