"""Serving benchmarks: servers with a backend each, the same prompts for all, rows and tables."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlab.serving.runs import run as run
    from kvlab.serving.tables import report as report
    from kvlab.serving.tables import serving_block as serving_block

_HOME = {"run": "kvlab.serving.runs", "report": "kvlab.serving.tables", "serving_block": "kvlab.serving.tables"}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvlab.serving' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
