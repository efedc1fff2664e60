"""Conformance suites for kvlab's stores, serdes, policies, transforms and connectors, and for those of other packages.

Needs pytest and hypothesis, which the extra ``test`` brings.
"""

from typing import TYPE_CHECKING

from kvlab.installed import needed
from kvlab.lazy import lazy

if TYPE_CHECKING:
    from kvlab.testing.budgets import BudgetTests as BudgetTests
    from kvlab.testing.connectors import ConnectorTests as ConnectorTests
    from kvlab.testing.policies import PolicyTests as PolicyTests
    from kvlab.testing.serde import SerdeTests as SerdeTests
    from kvlab.testing.stores import StoreTests as StoreTests
    from kvlab.testing.transforms import TransformTests as TransformTests

_HOME = {
    "BudgetTests": "kvlab.testing.budgets",
    "ConnectorTests": "kvlab.testing.connectors",
    "PolicyTests": "kvlab.testing.policies",
    "SerdeTests": "kvlab.testing.serde",
    "StoreTests": "kvlab.testing.stores",
    "TransformTests": "kvlab.testing.transforms",
}
__all__ = [*_HOME]
for module in ("pytest", "hypothesis"):
    needed(module, "kvlab.testing")
needed("pytest").register_assert_rewrite(*_HOME.values())  # failures show the values that were compared
__getattr__, __dir__ = lazy(__name__, _HOME)
