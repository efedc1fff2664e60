"""What every store promises, as tests. Subclass, say how to open yours, inherit the tests::

class TestMyStore(StoreTests):
    def open(self, where, max_bytes):
        return MyStore(where, max_bytes)
"""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kvlab.hostmemory import aligned
from kvlab.stores.base import MAX_KEY_BYTES, Buffer, Store, ValueTooLongError
from kvlab.testing.machines import ODD_KEYS, StoreMachine, drive, in_child, pattern, run_threads
from kvlab.testing.wanted import refused, to_define

MAX_BYTES = 1 << 20


class StoreTests:
    """The suite. Each test gets a fresh, empty `store` of `MAX_BYTES`."""

    persistent: ClassVar[bool] = False  # a second store opened at the same place finds what the first one stored
    examples: ClassVar[int] = 60  # of the model test

    def open(self, where: Path, max_bytes: int) -> Store:
        """A store at `where` (a folder name not yet used, or used before by the same store) with this budget."""
        raise to_define(self, "open(self, where, max_bytes)", "a store at the folder `where` with this budget")

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with self.open(tmp_path / "store", MAX_BYTES) as store:
            yield store

    def test_missing_key_is_none_not_an_error(self, store: Store) -> None:
        assert store.get("absent") is None
        assert store.get_into("absent", memoryview(bytearray(8))) is None
        assert store.size_of("absent") is None
        assert not store.contains("absent")
        assert store.delete("absent") is False
        assert store.get_many(["absent"]) == [None]
        assert store.why_missing("absent") == "never_stored"
        assert list(store.keys()) == []

    @pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4097, 3 * 4096, 100_001])
    def test_what_was_put_is_got(self, store: Store, size: int) -> None:
        value = pattern(size)
        assert store.put("k", value) is True
        got = store.get("k")
        assert got is not None
        assert bytes(got) == value
        assert store.size_of("k") == size
        assert store.contains("k")
        assert list(store.keys()) == ["k"]

    def test_an_empty_value_is_not_a_missing_one(self, store: Store) -> None:
        assert store.put("k", b"") is True
        assert store.size_of("k") == 0
        got = store.get("k")
        assert got is not None
        assert len(got) == 0
        assert store.get_into("k", memoryview(bytearray())) == 0

    def test_several_buffers_are_one_value(self, store: Store) -> None:
        pieces: list[Buffer] = [b"", pattern(4096, 1), bytearray(pattern(5, 2)), memoryview(pattern(10_000, 3)), b"x"]
        assert store.put("k", pieces)
        got = store.get("k")
        assert got is not None
        assert bytes(got) == b"".join(bytes(piece) for piece in pieces)

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 50_000])
    @pytest.mark.parametrize("offset", [0, 1, 64])
    def test_get_into_writes_the_value_and_nothing_else(self, store: Store, size: int, offset: int) -> None:
        store.put("k", pattern(size))
        room = bytearray(b"\xee" * (offset + size + 5000))
        assert store.get_into("k", memoryview(room)[offset:]) == size
        assert bytes(room[offset : offset + size]) == pattern(size)
        assert set(room[:offset]) <= {0xEE}
        exact = bytearray(size)
        assert store.get_into("k", memoryview(exact)) == size
        assert bytes(exact) == pattern(size)

    def test_a_buffer_too_small_is_told(self, store: Store) -> None:
        store.put("k", pattern(5000))
        wanted = "a value that does not fit must raise ValueTooLongError (see kvlab.stores.base.check_fits)"
        with refused(ValueTooLongError, wanted):
            store.get_into("k", memoryview(bytearray(4999)))
        assert store.get_into("k", memoryview(bytearray(5000))) == 5000
        with refused(ValueTooLongError, wanted):
            store.get_pieces("k", [memoryview(bytearray(2000)), memoryview(bytearray(2999))])

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000, 65_536])
    def test_a_value_fills_buffers_one_after_the_other(self, store: Store, size: int) -> None:
        store.put("k", pattern(size))
        for lengths in ((4096, 65_536), (4096, 16_384, 65_536), (1, 0, 70_000), (66_000, 10)):
            room = aligned(sum(lengths))
            room[:] = b"\xee" * room.nbytes
            edges = [0, *itertools.accumulate(lengths)]
            assert store.get_pieces("k", [room[a:b] for a, b in itertools.pairwise(edges)]) == size
            assert bytes(room[:size]) == pattern(size)
        assert store.get_pieces("absent", [room]) is None

    def test_put_does_not_keep_the_callers_buffer(self, store: Store) -> None:
        buffer = bytearray(b"before")
        store.put("k", memoryview(buffer))
        buffer[:] = b"after!"
        assert bytes(store.get("k") or b"") == b"before"

    def test_what_was_got_is_the_callers(self, store: Store) -> None:
        store.put("k", pattern(5000))
        got = store.get("k")
        assert got is not None
        if not memoryview(got).readonly:
            memoryview(got)[:4] = b"mine"
        store.put("k", pattern(5000, 1))
        store.delete("k")
        store.put("other", pattern(5000, 2))
        assert bytes(got[4:]) == pattern(5000)[4:]

    def test_put_replaces(self, store: Store) -> None:
        store.put("k", pattern(9000, 1))
        store.put("k", pattern(50, 2))
        assert bytes(store.get("k") or b"") == pattern(50, 2)
        assert list(store.keys()) == ["k"]

    def test_answers_are_positional(self, store: Store) -> None:
        store.put("a", b"1")
        store.put("c", b"3")
        asked = ["c", "b", "a", "c"]
        assert store.contains_many(asked) == [True, False, True, True]
        assert [None if value is None else bytes(value) for value in store.get_many(asked)] == [b"3", None, b"1", b"3"]
        assert store.contains_many([]) == []
        assert store.get_many([]) == []

    def test_delete(self, store: Store) -> None:
        store.put("k", b"v")
        assert store.delete("k") is True
        assert store.delete("k") is False
        assert store.get("k") is None
        assert not store.contains("k")

    def test_clear(self, store: Store) -> None:
        for index in range(5):
            store.put(f"k{index}", pattern(100, index))
        store.clear()
        assert list(store.keys()) == []
        assert store.get("k1") is None

    def test_a_broken_value_set_aside_is_not_served_again(self, store: Store) -> None:
        store.put("k", b"broken")
        store.put("other", b"good")
        store.quarantine("k", "checksum")
        assert store.get("k") is None
        assert not store.contains("k")
        assert store.counters.dropped == 1
        store.quarantine("absent", "checksum")
        assert bytes(store.get("other") or b"") == b"good"
        assert store.put("k", b"new")
        assert bytes(store.get("k") or b"") == b"new"

    def test_a_value_that_replaced_the_broken_one_is_not_set_aside(self, store: Store) -> None:
        for broken in (b"", b"broken", pattern(9000, 1)):
            store.put("k", pattern(9000))
            assert store.quarantine("k", "checksum", broken) is False
            assert bytes(store.get("k") or b"") == pattern(9000)
            store.put("k", broken)
            found = [memoryview(broken)[:5000], memoryview(broken)[5000:]]
            assert store.quarantine("k", "checksum", found) is True
            assert store.get("k") is None
        store.put("k", pattern(9000))
        assert store.quarantine("k", "truncated", pattern(9000)[:4096]) is True, "as far as it was read"
        assert store.quarantine("absent", "checksum", b"") is False

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000])
    def test_a_head_is_the_first_bytes_of_a_value(self, store: Store, size: int) -> None:
        store.put("k", pattern(size))
        for num_bytes in (0, 8, 4096, 16_392, 30_000):
            got = store.get_head("k", num_bytes)
            assert got is not None
            assert bytes(got) == pattern(size)[:num_bytes]
        assert store.get_head("absent", 8) is None

    def test_a_read_after_renew_is_a_read_like_any_other(self, store: Store) -> None:
        store.renew()
        store.put("k", b"good")
        assert bytes(store.get("k") or b"") == b"good"
        store.renew()
        assert bytes(store.get("k") or b"") == b"good"
        assert store.quarantine("k", "checksum") is True
        assert store.quarantine("absent", "checksum") is False

    def test_a_key_that_is_too_long_is_refused(self, store: Store) -> None:
        assert store.put("k" * MAX_KEY_BYTES, b"v") is True
        for key in ("k" * (MAX_KEY_BYTES + 1), "\u9375" * MAX_KEY_BYTES, "k" * 1_000_000):
            assert store.put(key, b"v") is False
            assert store.get(key) is None
            assert store.size_of(key) is None
            assert store.contains_many([key, "k" * MAX_KEY_BYTES]) == [False, True]
            assert store.delete(key) is False
            store.touch([key])
            store.quarantine(key, "test")
        assert list(store.keys()) == ["k" * MAX_KEY_BYTES]

    def test_a_forked_child_has_a_store_that_works(self, store: Store) -> None:
        """While threads of the parent are in the middle of calls, which the child has no threads to end."""
        values = {f"k{index}": pattern(3000 + 500 * index, index) for index in range(8)}
        for key, value in values.items():
            store.put(key, value)
        stop = threading.Event()
        wrong: list[str] = []

        def use(seed: int) -> None:
            for key in itertools.cycle(values):
                if stop.is_set():
                    break
                if seed % 2:
                    store.put(key, values[key])
                got = store.get(key)
                if got is not None and bytes(got) != values[key]:
                    wrong.append(key)

        def work() -> None:
            for key in values:
                got = store.get(key)
                assert got is None or bytes(got) == values[key], key
            assert store.put("of the child", b"c")
            assert bytes(store.get("of the child") or b"") == b"c"
            assert store.contains_many(["of the child", "absent"]) == [True, False]
            assert store.delete("of the child")
            assert store.used_bytes >= 0
            store.close()

        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        try:
            codes = [in_child(work) for _ in range(4)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert codes == [0] * 4
        assert wrong == []
        assert all(bytes(store.get(key) or b"") == value for key, value in values.items())

    def test_odd_keys_are_keys_like_any_other(self, store: Store) -> None:
        for index, key in enumerate(ODD_KEYS):
            assert store.put(key, pattern(10, index)), key
        assert sorted(store.keys()) == sorted(ODD_KEYS)
        for index, key in enumerate(ODD_KEYS):
            assert bytes(store.get(key) or b"") == pattern(10, index), key

    def test_values_that_look_like_ours_are_kept_as_they_are(self, store: Store) -> None:
        """A header that claims 2**60 bytes is the reader's to refuse; the store allocates nothing for it."""
        value = (1 << 60).to_bytes(8, "little") + b'{"x":1}'
        assert store.put("k", value)
        assert bytes(store.get("k") or b"") == value

    def test_counters_and_rows(self, store: Store) -> None:
        store.put("k", pattern(100))
        store.get("k")
        store.get("absent")
        row = store.stats()
        assert (row["puts"], row["hits"], row["misses"]) == (1, 1, 1)
        assert row["get_bytes"] == 100
        assert row["tier"] == store.name
        assert isinstance(row["used_bytes"], int)
        assert store.rows()

    def test_touching_anything_is_harmless(self, store: Store) -> None:
        store.put("k", b"v")
        store.touch(["absent", "k"])
        store.touch(iter(["k"]))
        assert bytes(store.get("k") or b"") == b"v"

    def test_threads_see_whole_values(self, store: Store) -> None:
        """Writers replace one key by values of other lengths; a reader sees one of them whole, or none."""
        values = [pattern(3000 + 4096 * index, index) for index in range(4)]
        wrong: list[str] = []

        def write(value: bytes) -> None:
            for _ in range(15):
                store.put("k", value)

        def read() -> None:
            for _ in range(40):
                got = store.get("k")
                if got is not None and bytes(got) not in values:
                    wrong.append(f"{len(got)} bytes")

        run_threads([*[lambda value=value: write(value) for value in values], read, read])
        assert wrong == []
        assert bytes(store.get("k") or b"") in values

    def test_a_new_store_at_the_place_finds_it(self, tmp_path: Path) -> None:
        with self.open(tmp_path / "store", MAX_BYTES) as store:
            store.put("k", pattern(5000))
        with self.open(tmp_path / "store", MAX_BYTES) as store:
            got = store.get("k")
            assert (got is not None and bytes(got) == pattern(5000)) == self.persistent
            assert store.contains("k") == self.persistent

    def test_it_behaves_like_a_dict(self, tmp_path: Path) -> None:
        """Hypothesis drives the store and a dict side by side; room is ample, so nothing may be lost."""
        counter = itertools.count()
        drive(lambda: StoreMachine(self.open(tmp_path / str(next(counter)), 64 << 20)), self.examples)
