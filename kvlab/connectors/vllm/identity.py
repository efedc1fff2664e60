"""Which model is this? By content of its config and weights, not by the path's name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import vllm

from kvlab.connectors.vllm import compat
from kvlab.connectors.vllm.options import options_that_change_kv
from kvlab.hashing import Namespace

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
WHOLE_FILE_BYTES = 8 << 20
SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 64 << 10


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes and content of the weight files.

    Files up to 8 MiB are read whole; of larger ones 64 windows of 64 KiB at even distances, first and last bytes
    included. Two fine-tunes that agree in every window and size are taken for one model; the connector setting
    `namespace` keeps such apart.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\0".encode())
        with file.open("rb") as source:
            if size <= WHOLE_FILE_BYTES:
                digest.update(source.read())
                continue
            for i in range(SAMPLES_PER_FILE):
                source.seek(i * (size - SAMPLE_BYTES) // (SAMPLES_PER_FILE - 1))
                digest.update(source.read(SAMPLE_BYTES))
    return digest.hexdigest()


def model_folder(model: str, revision: str | None) -> Path | None:
    """The folder the weights were loaded from, if it can be told without a network."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def engine_namespace(vllm_config: Any, kv_cache_config: Any, *, extra: str, serde: str) -> Namespace:
    """Everything but the tokens (and the rank) that makes this engine's KV differ from another's."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    served = compat.served_groups(kv_cache_config)
    groups = kv_cache_config.kv_cache_groups
    config = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    load_format = str(vllm_config.load_config.load_format)
    folder = model_folder(model.model, model.revision)
    if "dummy" in load_format:
        weights = f"dummy:{model.seed}"
    else:
        weights = weights_fingerprint(folder) if folder else f"{model.model}@{model.revision}"
    pages = {layer: size for group in groups for layer, size in compat.page_bytes(group).items()}
    fields: dict[str, str | int | None] = {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights,
        "quantization": str(model.quantization),
        "dtype": str(model.dtype),
        "kv_dtype": str(cache.cache_dtype),
        "kv_scales": str(getattr(cache, "calculate_kv_scales", None)),
        "layout": compat.layout_name(vllm_config, kv_cache_config),
        "packing": compat.packing(vllm_config),
        "pages": hashlib.sha256(json.dumps(sorted(pages.items())).encode()).hexdigest()[:16],
        "block_tokens": served.block_tokens,
        "tensor_parallel": parallel.tensor_parallel_size,
        "engine": "vllm " + ".".join(vllm.__version__.split("+")[0].split(".")[:2]),
        "serde": serde,
        "extra": extra,
    }
    fields |= options_that_change_kv(vllm_config)
    if served.are_several or served.have_windows:  # which decide what an object holds
        layers = [[window, list(group.layer_names)] for window, group in zip(served.windows, groups, strict=True)]
        fields["groups"] = hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]
    return Namespace(Path(model.model).name, fields)


def rank_namespace(namespace: Namespace, rank: int) -> Namespace:
    """The namespace of one tensor-parallel rank's objects."""
    return Namespace(namespace.model, {**namespace.fields, "rank": rank})
