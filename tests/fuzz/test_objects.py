"""The fuzz target, bounded; ``KVLAB_FUZZ_ROUNDS`` and ``KVLAB_FUZZ_SEED`` make it longer or another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_hostile_objects_are_format_errors_within_bounded_memory() -> None:
    rounds, seed = os.environ.get("KVLAB_FUZZ_ROUNDS", "3000"), os.environ.get("KVLAB_FUZZ_SEED", "0")
    command = [sys.executable, "-m", "tests.fuzz.objects", "--rounds", rounds, "--seed", seed]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=None)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert f"{rounds} objects, 0 failures" in ran.stdout
