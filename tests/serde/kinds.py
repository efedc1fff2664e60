"""Every kind, as the tests use it."""

from functools import lru_cache

import torch

from kvlab.geometry import AXES
from kvlab.serde import Serde, get_serde
from kvlab.serde.cachegen import CacheGenSerde
from kvlab.serde.tables import Tables, profile
from kvlab.testing.serde import kv_like

SHAPE = (3, 2, 16)  # layers, kv_heads, head_dim of SerdeTests
SPECS = [
    "naive",
    "lossless",
    "fp8",
    "int8",
    "int8:k=channel,v=token",
    "int4",
    "int4:group=16",
    "centered",
    "centered:bits=8,theta=500.0,rotary=8,style=pairs",
    "rotated4",
    "cachegen",
    "cachegen-lmcache",
]
MAX_ERROR = {
    "fp8": 0.04,
    "int8": 0.02,
    "int4": 0.16,
    "centered": 0.16,
    "rotated4": 0.13,
    "cachegen": 0.16,
    "cachegen-lmcache": 0.3,
}


@lru_cache
def tables(deltas: bool = True) -> Tables:
    """Tables of the tests' own pretended model."""
    texts = [kv_like((SHAPE[0], 64, SHAPE[1], 2, SHAPE[2]), "float32", seed) for seed in range(4)]
    return profile(texts, AXES, level=0.25, deltas=deltas)


@lru_cache
def serde_of(spec: str) -> Serde:
    return CacheGenSerde(tables()) if spec == "cachegen" else get_serde(spec)


def sample() -> torch.Tensor:
    """The KV behind the golden files."""
    return kv_like((SHAPE[0], 23, SHAPE[1], 2, SHAPE[2]), "bfloat16", 7)
