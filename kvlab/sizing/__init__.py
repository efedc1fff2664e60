"""The size calculator: how big the KV cache of any model is, and why.

`size_calculator` answers for one model, `compare_sizes` for several. Needs nothing but the standard library.
"""

from kvlab.sizing.calculator import size_calculator
from kvlab.sizing.compare import Comparison, compare_sizes
from kvlab.sizing.kv_size import KVSize

__all__ = ["Comparison", "KVSize", "compare_sizes", "size_calculator"]


def __dir__() -> list[str]:
    return __all__
