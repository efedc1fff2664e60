"""Conformance suites: subclass one, give it your own Store or Serde, and inherit its tests (needs pytest)."""

from importlib import import_module
from typing import Any

_HOME = {"SerdeTests": "kvlab.testing.serde", "StoreTests": "kvlab.testing.stores"}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvlab.testing' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
