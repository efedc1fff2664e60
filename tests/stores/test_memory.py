from kvlab.stores.memory import MemoryStore
from kvlab.testing import BudgetTests, StoreTests


class TestMemoryStore(StoreTests, BudgetTests):
    def open(self, where, max_bytes):
        return MemoryStore(max_bytes)
