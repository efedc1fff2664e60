"""What a store promises that keeps a byte budget of its own, as tests. Inherit beside `StoreTests`."""

import itertools
import threading
from pathlib import Path
from typing import ClassVar

from kvlab.stores.base import Store
from kvlab.testing.machines import BudgetMachine, drive, pattern, run_threads
from kvlab.testing.wanted import to_define

MAX_BYTES = 1 << 20


class BudgetTests:
    """The suite; a store whose server keeps the budget for many does not take part."""

    overhead: ClassVar[int] = 0  # bytes of budget taken per value beyond its length, at most
    examples: ClassVar[int] = 60

    def open(self, where: Path, max_bytes: int) -> Store:
        """As in `StoreTests`."""
        raise to_define(self, "open(self, where, max_bytes)", "a store at the folder `where` with this budget")

    def on_medium(self, where: Path, store: Store) -> int | None:
        """Bytes that lie on the medium, counted without the store; None if there is no second way to count."""
        return None

    def test_used_bytes_counts_values(self, tmp_path: Path) -> None:
        with self.open(tmp_path / "store", MAX_BYTES) as store:
            assert store.max_bytes == MAX_BYTES
            assert store.used_bytes == 0
            store.put("a", pattern(1000))
            store.put("b", pattern(500))
            assert 1500 <= store.used_bytes <= 1500 + 2 * self.overhead
            store.put("a", pattern(10))
            assert 510 <= store.used_bytes <= 510 + 2 * self.overhead
            store.delete("a")
            store.delete("b")
            assert store.used_bytes == 0

    def test_a_full_tier_lets_the_least_recently_used_go(self, tmp_path: Path) -> None:
        size = 60_000
        with self.open(tmp_path / "store", 3 * (size + self.overhead) + 100) as store:
            for key in "abc":
                store.put(key, pattern(size))
            store.get("a")
            store.put("d", pattern(size))
            assert sorted(store.keys()) == ["a", "c", "d"]
            assert store.why_missing("b") == "evicted"
            assert store.counters.evictions == 1
            assert store.counters.evicted_bytes >= size
            store.touch(["c"])
            store.put("e", pattern(size))
            assert sorted(store.keys()) == ["c", "d", "e"]

    def test_too_large_is_refused_and_costs_nothing(self, tmp_path: Path) -> None:
        with self.open(tmp_path / "store", 100_000) as store:
            store.put("a", pattern(50_000))
            assert store.put("b", pattern(100_001)) is False
            assert store.counters.refused == 1
            assert bytes(store.get("a") or b"") == pattern(50_000)
            assert store.put("a", pattern(100_001)) is False

    def test_it_holds_for_any_sequence(self, tmp_path: Path) -> None:
        counter = itertools.count()

        def machine() -> BudgetMachine:
            where = tmp_path / str(next(counter))
            return BudgetMachine(self.open(where, BudgetMachine.MAX), lambda store: self.on_medium(where, store))

        drive(machine, self.examples)

    def test_it_holds_under_eight_threads(self, tmp_path: Path) -> None:
        where = tmp_path / "store"
        over: list[int] = []
        done = threading.Event()
        with self.open(where, 200_000) as store:

            def watch() -> None:
                while not done.wait(0.001):
                    used = store.used_bytes
                    if not 0 <= used <= store.max_bytes:
                        over.append(used)

            def work(seed: int) -> None:
                for index in range(60):
                    key = f"k{(index * 7 + seed * 3) % 11}"
                    size = (index * 7919 + seed * 104_729) % 60_000
                    store.put(key, pattern(64, seed) * (size // 64))
                    store.get(f"k{(index + seed) % 11}")
                    if index % 10 == 9:
                        store.delete(key)

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                run_threads([lambda seed=seed: work(seed) for seed in range(8)])
            finally:
                done.set()
                watcher.join()
            assert over == []
            held = sum(store.size_of(key) or 0 for key in store.keys())  # noqa: SIM118 - a store is no dict
            assert held <= store.used_bytes <= held + 11 * self.overhead
            counted = self.on_medium(where, store)
            assert counted is None or counted == store.used_bytes
