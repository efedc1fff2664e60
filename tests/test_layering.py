"""Imports point down, heavy packages enter at one named place, no file grows past 400 lines."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kvlab"
FLOORS = [
    ["errors", "lazy", "progress", "system", "threads", "units"],
    ["auth", "geometry", "hostmemory", "fingerprint", "installed"],
    ["sharedmemory"],
    ["chunking", "hashing", "container"],
    ["stated", "transforms"],
    ["serde", "stores", "paged"],
    ["codecs", "objects", "machine", "sizing"],
    ["object_cache", "page_objects"],
    ["tierworker"],
    ["chaos", "engine", "datasets", "simulation"],
    ["judge"],
    ["connectors", "testing"],
    ["reuse", "serving"],
    ["plotting"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHIN_GROUND = {("units", "errors"), ("lazy", "errors")}  # errors imports nothing
HEAVY = {  # each enters at these places alone
    "vllm": ("connectors/vllm", "judge/engine.py", "paged/vllm_operators.py"),
    "pytest": ("testing",),
    "hypothesis": ("testing",),
    "plotly": ("plotting", "sizing/compare.py"),
    "transformers": ("connectors/transformers.py", "datasets"),
    "triton": ("paged", "serde", "codecs"),
    "numba": ("serde",),
    "pandas": ("sizing",),
}
FILES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py" and path != PACKAGE / "__init__.py"
]


def imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, from kvlab.x"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        assert name != "kvlab", f"{here} must import what it needs from kvlab's modules, not the front door"
        if name.startswith("kvlab.") and (room := name.split(".")[1]) not in ("__version__", here):
            assert FLOOR[room] < FLOOR[here] or (here, room) in WITHIN_GROUND, f"{here} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_heavy_packages_enter_at_one_place(path):
    here = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        places = HEAVY.get(name.split(".")[0])
        assert places is None or here.startswith(places), f"{here} must not import {name}"


def test_no_file_is_longer_than_400_lines():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_import_is_light():
    code = (
        "import sys, kvlab; heavy = {'torch', 'vllm', 'redis', 'plotly', 'numpy', 'transformers', 'pandas'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == ""


def test_front_door_is_small_and_opens():
    import kvlab

    assert len(kvlab.__all__) <= 13
    for name in kvlab.__all__:
        assert getattr(kvlab, name).__name__
