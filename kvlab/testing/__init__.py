"""Conformance suites for kvlab's stores and serdes, and for those of other packages. Needs pytest and hypothesis."""

from typing import TYPE_CHECKING

from kvlab.lazy import lazy

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
__getattr__, __dir__ = lazy(__name__, _HOME)
