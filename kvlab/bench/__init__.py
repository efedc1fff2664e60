"""Benchmarks: demo model, datasets, serving runs, simulation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlab.bench.serving import run as run
    from kvlab.bench.tables import report as report
    from kvlab.bench.tables import serving_block as serving_block

_HOME = {"run": "kvlab.bench.serving", "report": "kvlab.bench.tables", "serving_block": "kvlab.bench.tables"}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvlab.bench' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
