"""Conformance suites that anybody may run on a store or serde of their own. Needs pytest and hypothesis."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvlab.testing.budgets import BudgetTests as BudgetTests
    from kvlab.testing.serde import SerdeTests as SerdeTests
    from kvlab.testing.stores import StoreTests as StoreTests

_HOME = {
    "BudgetTests": "kvlab.testing.budgets",
    "SerdeTests": "kvlab.testing.serde",
    "StoreTests": "kvlab.testing.stores",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvlab.testing' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)
