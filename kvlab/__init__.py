"""kvlab: a Jupyter-first research toolkit for the KV cache of large language models.

Names are loaded on first use, so that ``import kvlab`` costs milliseconds and pulls in neither torch nor vllm.
"""

from typing import TYPE_CHECKING

from kvlab.lazy import lazy

if TYPE_CHECKING:
    from kvlab.chunking import Chunker as Chunker
    from kvlab.connectors import vllm_config as vllm_config
    from kvlab.connectors.transformers import capture as capture
    from kvlab.connectors.vllm.by_hand.attach import attach as attach
    from kvlab.engine import CacheEngine as CacheEngine
    from kvlab.geometry import KVGeometry as KVGeometry
    from kvlab.serde import get_serde as get_serde
    from kvlab.simulation.simulate import simulate as simulate
    from kvlab.simulation.sweep import sweep as sweep
    from kvlab.simulation.why import why as why
    from kvlab.sizing import compare_sizes as compare_sizes
    from kvlab.sizing import size_calculator as size_calculator
    from kvlab.stores import open_store as open_store

__version__ = "0.1.0"

_HOME = {
    "attach": "kvlab.connectors.vllm.by_hand.attach",
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
    "why": "kvlab.simulation.why",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME, shown=("__version__",))
