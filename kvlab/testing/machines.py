"""Hypothesis machines that drive a store beside a dict, and what the suites share."""

import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from kvlab.stores.base import Store

ODD_KEYS = [
    "kvlab:org-Model.1:00ff:" + "ab" * 16,
    *("", " ", ".", "..", "../up", "/etc/passwd", "a/b", "a\\b", "a%2Fb", "a\nb", "a\0b", "a.safetensors", "con"),
    *("-rf", "~", "*", "?x=1#y", ".kvlab/journal", "ключ", "鍵", "🔑", "\udcff", "k" * 500, "鍵" * 150),
]
KEYS = st.one_of(st.sampled_from(ODD_KEYS), st.text(max_size=40))


def pattern(size: int, seed: int = 0) -> bytes:
    """`size` bytes that differ between seeds and positions, so that a shifted or foreign value is seen."""
    return bytes((at * 7 + at // 251 + seed * 31) & 0xFF for at in range(size))


def in_child(work: Callable[[], None], *, limit_s: int = 60) -> int:
    """Fork, run `work` in the child, and return its exit status: 0, 1 if it raised (printed), negative if it was killed
    because it took longer than `limit_s`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit_s)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class StoreMachine(RuleBasedStateMachine):
    """A store with ample room, and the dict it must agree with."""

    stored = Bundle("stored")

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.model: dict[str, bytes] = {}

    @rule(target=stored, key=KEYS, value=st.binary(max_size=9000))
    def put(self, key: str, value: bytes) -> str:
        assert self.store.put(key, value) is True
        self.model[key] = value
        return key

    @rule(key=st.one_of(KEYS, stored))
    def get(self, key: str) -> None:
        got = self.store.get(key)
        assert (None if got is None else bytes(got)) == self.model.get(key)

    @rule(key=stored, extra=st.integers(0, 5000))
    def get_into(self, key: str, extra: int) -> None:
        expected = self.model.get(key)
        room = bytearray(len(expected or b"") + extra)
        size = self.store.get_into(key, memoryview(room))
        assert size == (None if expected is None else len(expected))
        assert expected is None or bytes(room[: len(expected)]) == expected

    @rule(key=consumes(stored))
    def delete(self, key: str) -> None:
        assert self.store.delete(key) == (self.model.pop(key, None) is not None)

    @rule(keys=st.lists(st.one_of(KEYS, stored), max_size=6))
    def lookup(self, keys: list[str]) -> None:
        assert self.store.contains_many(keys) == [key in self.model for key in keys]
        self.store.touch(keys)

    @invariant()
    def same_keys(self) -> None:
        assert sorted(self.store.keys()) == sorted(self.model)

    def teardown(self) -> None:
        self.store.close()


class BudgetMachine(RuleBasedStateMachine):
    """A store too small for what it is given: it may forget, it may not lie and not grow."""

    MAX = 20_000

    def __init__(self, store: Store, on_medium: Any) -> None:
        super().__init__()
        self.store = store
        self.on_medium = on_medium
        self.model: dict[str, bytes] = {}

    @rule(key=st.sampled_from("abcdef"), size=st.integers(0, 25_000), seed=st.integers(0, 9))
    def put(self, key: str, size: int, seed: int) -> None:
        value = pattern(size, seed)
        if self.store.put(key, value):
            self.model[key] = value
            assert self.store.contains(key)
        else:
            assert size > self.MAX // 2  # ample for each alone
            self.model = {key: value for key, value in self.model.items() if self.store.contains(key)}

    @rule(key=st.sampled_from("abcdef"))
    def get(self, key: str) -> None:
        got = self.store.get(key)
        assert got is None or bytes(got) == self.model[key]
        assert got is not None or self.store.why_missing(key) != ""

    @rule(key=st.sampled_from("abcdef"))
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)
        assert not self.store.contains(key)

    @rule(key=st.sampled_from("abcdef"))
    def quarantine(self, key: str) -> None:
        self.store.quarantine(key, "test")
        assert not self.store.contains(key)

    @invariant()
    def within_budget(self) -> None:
        assert 0 <= self.store.used_bytes <= self.store.max_bytes
        counted = self.on_medium(self.store)
        assert counted is None or counted == self.store.used_bytes

    def teardown(self) -> None:
        self.store.close()


def run_threads(jobs: list[Any]) -> None:
    """Run `jobs` at once; the first error of any is raised here."""
    errors: list[BaseException] = []

    def guarded(job: Any) -> None:
        try:
            job()
        except BaseException as error:  # raised again below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def drive(machine: Callable[[], RuleBasedStateMachine], examples: int) -> None:
    """Run a machine as one test, without deadlines: a loaded host is not a broken store."""
    profile = settings(
        max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=profile)
