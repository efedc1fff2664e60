"""What the project says of itself holds together."""

import tomllib
from pathlib import Path

import yaml

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
