"""The command line as a shell uses it: readers that leave, files that are not there, mistakes in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.cli.profile import main as profile_main
from kvlab.errors import ConfigError

KVLAB = [sys.executable, "-m", "kvlab"]


@pytest.mark.parametrize(
    "args", [["size", "Qwen2.5-7B"], ["size", "Qwen2.5-7B", "--json"], ["--help"], ["size", "--help"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_left_costs_no_traceback(args: list[str], unbuffered: str) -> None:
    """As `kvlab size | head -1`, but the reader is gone before the first byte."""
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([*KVLAB, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read()
    passed_over = unbuffered and args == ["size", "--help"]  # by argparse itself, which then sees the error
    assert process.wait(timeout=60) == (0 if passed_over else 141)
    assert told == b""


def test_another_pipe_that_broke_is_not_taken_for_stdout() -> None:
    code = (
        "import sys, types; m = types.ModuleType('m')\n"
        "def f(args): raise BrokenPipeError('a socket')\n"
        "m.f = f; sys.modules['m'] = m\n"
        "import kvlab.__main__ as cli; cli.COMMANDS['size'] = ('m:f', '')\n"
        "try: cli.main(['size'])\nexcept BrokenPipeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "a socket\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "text").write_text("some words")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        ("absent", "text", "must be a checkpoint folder with a config.json"),
        ("text", "text", "must be a checkpoint folder with a config.json"),
        ("model", "absent", "cannot read .*absent.*: No such file"),
        ("model", "model", "cannot read .*: Is a directory"),
        ("model", "binary", "is not UTF-8 text"),
        ("model", "empty", "is empty"),
        ("model", "text", "cannot load a model from .*model"),
    ],
)
def test_profile_says_what_is_wrong_in_one_line(folder: Path, model: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        profile_main([str(folder / model), str(folder / text)])
    assert "\n" not in str(caught.value)
