"""Shared fixtures, markers and the order of tests. Nothing here skips: a missing model or server is a failure."""

import gc
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import starts
from tests.support.lab_packages import closed_to

# One thread for each engine, on any core: several threads wait for each other in every small operation, which takes a
# scheduler's time slice (5 ms, 200 times a token) wherever another process computes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

hypothesis.settings.register_profile("kvlab", deadline=None)  # no test fails because the machine is busy
hypothesis.settings.load_profile("kvlab")
sys.addaudithook(starts.watch)
gc.disable()  # until all is imported: vLLM and torch are half a million objects, which stay

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["", "slow", "server", "notebook", "engine"]
# Tests that start nothing come first, cheap ones before slow ones. But files of a minute and more begin at once, of
# these and of the others, the longest first: a worker takes a whole file, and short ones at the end leave none with
# nothing to do.
LONG = [
    "tests/test_codec_kernels.py",
    "tests/serving/test_serving.py",
    "tests/judge/test_kvlab_is_judged.py",
    "tests/judge/test_mutants.py",
    "tests/judge/test_mutants_scarce.py",
    "tests/serving/test_bench.py",
    "tests/connectors/test_stress.py",
    "notebooks/05_run_a_benchmark.ipynb",
    "tests/connectors/test_ranks.py",
    "notebooks/08_edit_the_cache.ipynb",
    "tests/connectors/test_groups.py",
    "tests/connectors/test_states.py",
    "tests/test_lab.py",
    "tests/serving/test_restart.py",
    "tests/connectors/test_codecs.py",
    "tests/connectors/test_weights.py",
    "tests/connectors/test_disk_tier.py",
    "notebooks/09_reuse_without_prefix.ipynb",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("notebook")
            # A notebook starts several servers one after another; the limit of a single test would cut it off halfway.
            item.add_marker(pytest.mark.timeout(1800))
        else:
            for kind in starts.started_by(item):
                item.add_marker(kind)
    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def kind_of(item: pytest.Item) -> str:
    """The last of `KINDS` that the test is marked with."""
    return next((kind for kind in reversed(KINDS) if kind and item.get_closest_marker(kind)), "")


def place(item: pytest.Item) -> tuple[int, int, int]:
    """Where the test comes: see `LONG`."""
    kind, path = KINDS.index(kind_of(item)), item.nodeid.partition("::")[0]
    is_long = kind > 0 and path in LONG
    part = 2 if kind > 1 else 0 if is_long else kind
    return part, LONG.index(path) if is_long else len(LONG), kind


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(starts.ALLOWED, " ".join(marker.name for marker in item.iter_markers()))
        for name, value in (closed_to("demo") if item.path.suffix == ".ipynb" else {}).items():
            patch.setenv(name, value)  # a kernel has what `make lab` installs, and not what tests need
        return (yield)


@pytest.fixture(scope="session")
def demo_model_path() -> str:
    from kvlab.datasets.demo_model import demo_model

    return demo_model()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
