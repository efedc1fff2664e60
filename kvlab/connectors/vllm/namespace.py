"""Which model is this? By content of its config and weights, not by the path's name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import vllm

from kvlab.connectors.vllm import compat, states
from kvlab.connectors.vllm.options import options_that_change_kv
from kvlab.connectors.vllm.weights import draft_name, weights_name
from kvlab.hashing import Namespace


def engine_namespace(
    vllm_config: Any, kv_cache_config: Any, *, extra: str, serde: str, outlives: bool, loaded_here: bool
) -> Namespace:
    """Everything but the tokens (and the rank) that makes this engine's KV differ from another's.

    outlives: whether a tier outlives this process.
    loaded_here: whether this process loaded the weights.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    served = compat.served_groups(kv_cache_config)
    groups = kv_cache_config.kv_cache_groups
    config = model.hf_config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    pages = {layer: size for group in groups for layer, size in compat.page_bytes(group).items()}
    fields: dict[str, str | int | None] = {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights_name(vllm_config, outlives=outlives, named=bool(extra), loaded_here=loaded_here),
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
    if parallel.pipeline_parallel_size > 1:  # a rank knows the layers of its own stage; all have pages of one size
        stages = compat.stage_layers(vllm_config)
        fields |= {"pages": str(next(iter(pages.values()))), "stages": "+".join(map(str, stages))}
    if served.are_several or served.have_windows:  # which decide what an object holds
        layers = [[window, list(group.layer_names)] for window, group in zip(served.windows, groups, strict=True)]
        fields["groups"] = hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]
    if compat.drafts_have_kv(vllm_config):
        fields["draft"] = draft_name(vllm_config, outlives=outlives)
    if ahead := compat.draft_ahead(vllm_config):  # which decides what a hash stands for
        fields["draft_ahead"] = ahead
    if served.recurrent:
        about = [[at, *states.described(groups[at])] for at in sorted(served.recurrent)]
        fields["states"] = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return Namespace(Path(model.model).name, fields)


def rank_namespace(namespace: Namespace, rank: int) -> Namespace:
    """The namespace of the objects of one rank, of a tensor-parallel group and a pipeline stage."""
    return Namespace(namespace.model, {**namespace.fields, "rank": rank})
