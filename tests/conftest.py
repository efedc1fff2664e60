"""Shared fixtures, markers and the order of tests. Nothing here skips: a missing model or server is a failure."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support import starts

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

hypothesis.settings.register_profile("kvlab", deadline=None)  # no test fails because the machine is busy
hypothesis.settings.load_profile("kvlab")
sys.addaudithook(starts.watch)

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["slow", "engine", "server", "notebook"]  # cheap tests first, then in this order


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("notebook")
            # A notebook starts several servers one after another; the limit of a single test would cut it off halfway.
            item.add_marker(pytest.mark.timeout(1800))
        else:
            for kind in starts.started_by(item):
                item.add_marker(kind)
        # Of what `-n 2 --dist loadgroup` runs at once: a file's tests stay together, engines never meet.
        heavy = kind_of(item) > KINDS.index("slow")
        item.add_marker(pytest.mark.xdist_group("one at a time" if heavy else item.nodeid.split("::")[0]))
    items.sort(key=kind_of)


def kind_of(item: pytest.Item) -> int:
    """Place of the test's last kind in `KINDS`, -1 if it has none."""
    return max((at for at, kind in enumerate(KINDS) if item.get_closest_marker(kind)), default=-1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    os.environ[starts.ALLOWED] = " ".join(marker.name for marker in item.iter_markers())
    try:
        return (yield)
    finally:
        del os.environ[starts.ALLOWED]


@pytest.fixture(scope="session")
def demo_model_path() -> str:
    from kvlab.bench.demo_model import demo_model

    return demo_model()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
