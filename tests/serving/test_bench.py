"""``kvlab bench`` with no flags, as README and the guide show it first, and with what `make lab` installs alone."""

import os
import re
import subprocess
import sys

import pytest

from kvlab.serving.preflight import usual_traffic
from tests.support.lab_packages import closed_to


@pytest.mark.server
@pytest.mark.timeout(1800)
def test_it_answers_with_no_flags(tmp_path, demo_model_path):
    env = {**os.environ, **closed_to("demo"), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "kvlab", "bench"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    prompts, rate = usual_traffic()
    assert f"for each 2 runs of {prompts} prompts of sharegpt at {rate:g}/s" in done.stderr
    runs = re.findall(r"= (\S+), sharegpt, run (\d): Serving Benchmark Result =", done.stdout)
    assert runs == [("none", "1"), ("none", "2"), ("kvlab-memory", "1"), ("kvlab-memory", "2")]
    assert re.findall(r"Successful requests: +(\d+)", done.stdout) == [str(prompts)] * 4
    assert re.findall(r"Failed requests: +(\d+)", done.stdout) == ["0"] * 4
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    head, _, none, memory = rows
    hits, verdict = head.index("hit tokens"), head.index("verdict")
    assert (none[0], none[hits]) == ("none", "0.0%")
    assert memory[0] == "kvlab-memory"
    assert re.fullmatch(r"\d+\.\d%", memory[hits])
    assert memory[hits] != "0.0%"
    assert {none[verdict], memory[verdict]} <= {"faster", "not faster", "slower"}, "a time, of which no test is sure"
