"""Reuse of KV that is no prefix, against computing all of it: documents computed alone and put one behind the other,
and prompts of which only some tokens are kept."""

from kvlab.reuse.bench import answered, compare_presses, compare_reuse, over_texts, with_seconds
from kvlab.reuse.methods import METHODS, Method, kept, pasted, recomputed, turned
from kvlab.reuse.presses import PRESSES, pressed, pruned
from kvlab.reuse.rope import rope_of

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
    "rope_of",
    "turned",
    "with_seconds",
]


def __dir__() -> list[str]:
    return __all__
