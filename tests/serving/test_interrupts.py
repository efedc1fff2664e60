"""An interrupted benchmark ends all that it started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import MARK, SERVER, command_of, marked, small_file

SLEEPS = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(600)  # a child"])
"""


@pytest.mark.slow  # imports and prepares a workload three times
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_nothing_running(number, demo_model_path, tmp_path):
    """Our processes, and all that they start. In place of vLLM's server and client stand two that start a child and
    sleep."""
    for module in ("entrypoints/openai/api_server.py", "utils/argparse_utils.py"):
        file = tmp_path / "stub" / "vllm" / module
        file.parent.mkdir(parents=True)
        file.write_text(SLEEPS)
    (tmp_path / "stub" / "vllm" / "__init__.py").touch()
    command = [
        sys.executable,
        "-m",
        "kvlab",
        "bench",
        "--backends",
        "kvlab-redis",
        "--num-prompts",
        "4",
        "--model",
        demo_model_path,
    ]
    command += ["--dataset-path", str(small_file(tmp_path)), "--folder", str(tmp_path / "work"), "--", *SERVER]
    path = os.pathsep.join(part for part in (str(tmp_path / "stub"), os.environ.get("PYTHONPATH")) if part)
    env = {**os.environ, MARK: str(tmp_path), "KVLAB_MODEL": demo_model_path, "PYTHONPATH": path}
    with open(tmp_path / "err", "wb") as err, ended(tmp_path):
        bench = subprocess.Popen(
            command, env=env, stdout=err, stderr=err, start_new_session=True, preexec_fn=heed_interrupts
        )
        running: list[bytes] = []
        while not any(b"api_server" in one for one in running) or sum(b"a child" in one for one in running) < 2:
            assert bench.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
            running = [command_of(pid) for pid in marked(str(tmp_path))]
        bench.send_signal(number)
        assert bench.wait() == (-9 if number == signal.SIGKILL else 130)
        while number == signal.SIGKILL and marked(str(tmp_path)):  # the guards end the rest
            time.sleep(0.1)
        assert marked(str(tmp_path)) == []
    if number != signal.SIGKILL:
        assert "interrupted" in (tmp_path / "err").read_text()


@contextlib.contextmanager
def ended(folder: Path) -> Iterator[None]:
    """Nothing that a failing test started goes on behind it."""
    try:
        yield
    finally:
        for pid in marked(str(folder)):
            os.kill(pid, signal.SIGKILL)


def heed_interrupts() -> None:
    """Processes that a shell starts in the background ignore interrupts, and so do those that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
