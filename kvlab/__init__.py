"""kvlab: a Jupyter-first research toolkit for the KV cache of large language models.

Names are loaded on first use, so that ``import kvlab`` costs milliseconds and pulls in neither torch nor vllm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlab.chunking import Chunker as Chunker
    from kvlab.connectors import vllm_config as vllm_config
    from kvlab.connectors.transformers import capture as capture
    from kvlab.engine import CacheEngine as CacheEngine
    from kvlab.geometry import KVGeometry as KVGeometry
    from kvlab.serde import get_serde as get_serde
    from kvlab.simulation.simulate import simulate as simulate
    from kvlab.simulation.sweep import sweep as sweep
    from kvlab.sizing import compare_sizes as compare_sizes
    from kvlab.sizing import size_calculator as size_calculator
    from kvlab.stores import open_store as open_store

__version__ = "0.1.0"

_HOME = {
    "capture": "kvlab.connectors.transformers",
    "CacheEngine": "kvlab.engine",
    "Chunker": "kvlab.chunking",
    "KVGeometry": "kvlab.geometry",
    "compare_sizes": "kvlab.sizing",
    "get_serde": "kvlab.serde",
    "open_store": "kvlab.stores",
    "simulate": "kvlab.simulation.simulate",
    "size_calculator": "kvlab.sizing",
    "sweep": "kvlab.simulation.sweep",
    "vllm_config": "kvlab.connectors",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvlab' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
