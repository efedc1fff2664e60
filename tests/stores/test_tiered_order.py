"""What a reader copies between tiers, or the background carries down, never hides a later write or delete."""

import threading
from contextlib import contextmanager

import pytest

from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore, guarded
from kvlab.testing.machines import in_child
from tests.support.gate import Gate


class Paused(Gate):
    """Stops the calls of one method: `is_inside` is set when one is there, and `is_open` lets it go on."""

    def __init__(self, method):
        super().__init__(MemoryStore(1 << 20))
        self.method = method
        self.is_inside = threading.Event()

    def _around(self, method, num_bytes):
        if method == self.method and not self.is_open.is_set():
            self.is_inside.set()
            super()._around(method, num_bytes)


@contextmanager
def running(target):
    """A thread in `target`, which has ended when the block has."""
    thread = threading.Thread(target=target)
    thread.start()
    yield
    thread.join(200)
    assert not thread.is_alive()


@contextmanager
def reading_old(stack, lower):
    """A reader that has "old" from the slower tier and does not give it out before the block has ended."""
    found = []
    stack.tiers[0].store.delete("k")
    lower.is_inside.clear()
    lower.is_open.clear()
    with running(lambda: found.append(stack.get("k"))):
        assert lower.is_inside.wait(200)
        yield
        lower.is_open.set()
    assert bytes(found[0]) == b"old"


@pytest.fixture(params=["through", "back"])
def stack(request):
    lower = Paused("get")
    lower.is_open.set()
    with TieredStore([MemoryStore(1 << 20), lower], write=request.param) as stack:
        stack.put("k", b"old")
        stack.drain()
        yield stack
        lower.is_open.set()


def test_a_reader_does_not_promote_over_a_later_put(stack):
    with reading_old(stack, stack.tiers[1].store):
        assert stack.put("k", b"new")
        assert stack.drain()
    assert bytes(stack.get("k")) == b"new"
    stack.tiers[0].store.delete("k")
    assert bytes(stack.get("k")) == b"new"


@pytest.mark.parametrize("remove", ["delete", "clear", "quarantine"])
def test_a_reader_does_not_bring_back_what_was_removed(stack, remove):
    arguments = {"delete": ["k"], "clear": [], "quarantine": ["k", "checksum"]}[remove]
    with reading_old(stack, stack.tiers[1].store):
        getattr(stack, remove)(*arguments)
    assert stack.get("k") is None
    assert not stack.contains("k")


def test_a_reader_that_begins_within_a_put_does_not_promote_over_it():
    """The faster tier has the new value, and loses it again, before the slower one has it."""
    lower = Paused("put")
    upper = MemoryStore(1 << 20)
    with TieredStore([upper, lower]) as stack:
        lower.inner.put("k", b"old")
        with running(lambda: stack.put("k", b"new")):
            assert lower.is_inside.wait(200)
            upper.delete("k")
            assert bytes(stack.get("k")) == b"old"
            lower.is_open.set()
        assert bytes(stack.get("k")) == b"new"


def test_a_put_waits_for_the_promotion_under_way_of_its_key_and_no_read_waits():
    upper, lower = Paused("put"), MemoryStore(1 << 20)
    with TieredStore([upper, lower]) as stack:
        lower.put("k", b"old")
        with running(lambda: stack.get("k")):
            assert upper.is_inside.wait(200)
            with running(lambda: stack.put("k", b"new")):
                assert bytes(stack.get("k")) == b"old"
                assert stack.get("other") is None
                upper.is_open.set()
        assert bytes(stack.get("k")) == b"new"
        assert bytes(upper.get("k")) == b"new"


@pytest.mark.parametrize("remove", ["delete", "clear", "put"])
def test_an_old_value_on_its_way_down_does_not_outlive_a_later_write(remove):
    lower = Paused("put")
    upper = MemoryStore(1 << 20)
    with TieredStore([upper, lower], write="back", promote=False) as stack:
        stack.put("k", b"old")
        assert lower.is_inside.wait(200)
        upper.delete("k")  # evicted: the stack does not list it any more
        if remove == "put":
            assert stack.put("k", b"new"), "it does not wait for the slower tier"
            upper.delete("k")
            assert stack.get("k") is None, "the reader may not clean up while the old value is on its way"
            lower.is_open.set()
        else:
            arguments = {"delete": ["k"], "clear": []}[remove]
            waits = threading.Event()
            cancel = stack._writer.cancel

            def cancelled(*keys):
                waits.set()
                cancel(*keys)

            stack._writer.cancel = cancelled
            with running(lambda: getattr(stack, remove)(*arguments)):
                assert waits.wait(200)
                lower.is_open.set()
        assert stack.drain(200)
        assert stack.get("k") is None
        assert stack.get("k") is None
        assert not lower.contains("k")


def test_two_writers_of_one_key_leave_one_value_in_all_tiers():
    lower = Paused("put")
    upper = MemoryStore(1 << 20)
    with TieredStore([upper, lower]) as stack, running(lambda: stack.put("k", b"one")):
        assert lower.is_inside.wait(200)
        with running(lambda: stack.put("k", b"two")):
            lower.is_open.set()
    assert bytes(upper.get("k")) == bytes(lower.inner.get("k")) == b"two"


def test_a_slow_put_holds_up_no_other_key():
    lower = Paused("put")
    with TieredStore([MemoryStore(1 << 20), lower]) as stack:
        lower.inner.put("read", b"value")
        with running(lambda: stack.put("k", b"new")):
            assert lower.is_inside.wait(200)
            assert bytes(stack.get("read")) == b"value"
            assert stack.delete("read")
            assert bytes(stack.get("k")) == b"new"
            lower.is_open.set()


def test_a_forked_child_writes_the_keys_that_the_parent_is_writing():
    lower = Paused("put")
    with TieredStore([MemoryStore(1 << 20), lower]) as stack, running(lambda: stack.put("k", b"new")):
        assert lower.is_inside.wait(200)

        def child():
            lower.is_open.set()
            stack.put("k", b"child")
            stack.tiers[0].store.delete("k")
            assert bytes(stack.get("k")) == b"child"
            assert stack.tiers[0].store.contains("k"), "it promotes too"
            stack.clear()

        status = in_child(child)
        lower.is_open.set()
    assert status == 0
    assert bytes(lower.inner.get("k")) == b"new"


def test_a_miss_is_not_forgotten_while_an_older_value_is_on_its_way(monkeypatch):
    monkeypatch.setattr(guarded, "MOST_MISSED", 1)
    lower = Paused("put")
    upper = MemoryStore(1 << 20)
    with TieredStore([upper, lower], write="back", promote=False) as stack:
        stack.put("k", b"old")
        assert lower.is_inside.wait(200)
        stack.put("k", b"new")
        stack.put("a", b"value")
        upper.delete("k")
        lower.is_open.set()
        assert stack.drain(200)
        assert stack.get("k") is None
