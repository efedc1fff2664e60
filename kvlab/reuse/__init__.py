"""Reuse of KV that is no prefix, against computing all of it: documents computed alone and put one behind the other,
and prompts of which only some tokens are kept."""

from kvlab.reuse.bench import answered, compare_presses, compare_reuse, over_texts, with_seconds
from kvlab.reuse.methods import METHODS, Method, kept, pasted, recomputed, turned
from kvlab.reuse.presses import PRESSES, pressed, pruned

__all__ = [
    "METHODS",
    "PRESSES",
    "Method",
    "answered",
    "compare_presses",
    "compare_reuse",
    "kept",
    "over_texts",
    "pasted",
    "pressed",
    "pruned",
    "recomputed",
    "turned",
    "with_seconds",
]


def __dir__() -> list[str]:
    return __all__
