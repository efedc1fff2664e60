"""Reuse of KV that is no prefix: documents computed alone, put one behind the other, against computing all of it."""

from kvlab.reuse.bench import compare_reuse
from kvlab.reuse.methods import METHODS, Method, kept, pasted, recomputed, turned

__all__ = ["METHODS", "Method", "compare_reuse", "kept", "pasted", "recomputed", "turned"]


def __dir__() -> list[str]:
    return __all__
