"""Objects of a small model, as its own engine and other writers make them."""

import torch

from kvlab.chunking import Chunker
from kvlab.container import pack
from kvlab.engine import CacheEngine
from kvlab.geometry import AXES, KVGeometry
from kvlab.hashing import Namespace
from kvlab.serde.wire import to_parts
from kvlab.stated import token_range

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=3, head_dim=8, dtype="float32")
CHUNKER = Chunker(chunk_tokens=32, block_tokens=8)
IDS = list(range(64))


def engine_on(store, **more):
    return CacheEngine(store, namespace=Namespace("m", {"dtype": "float32"}), chunker=CHUNKER, **more)


def kv_of(num_tokens, *, layers=2, dtype=torch.float32):
    return torch.randn(layers, num_tokens, 3, 2, 8, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


def put(engine, key, kv, first, end, *, axes=AXES):
    """An object as another writer of the same namespace would make it: `kv` need not fit the tokens it claims."""
    parts, metadata = to_parts(engine.serde.encode(kv, axes))
    metadata |= {"namespace": engine.namespace.canonical, **token_range(first, end)}
    assert engine.store.put(key, pack(key, parts, metadata))


def reason(engine):
    (found,) = engine.counters.misses
    return found
