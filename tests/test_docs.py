"""The docs: examples run, links lead somewhere, tables and pages are those of the code and the rows."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from kvlab.cli.commands import COMMANDS
from kvlab.cli.lmcache import page_tables
from kvlab.connectors import ConnectorConfig
from tests.support.examples import DOCS, GUIDE, ROOT, blocks
from tests.test_layering import FLOORS

PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FRONT_DOOR = [
    "cli.parser", "cli.tiers",
    "chunking", "connectors.config", "engine", "geometry", "plotting.theme", "plotting.ticks", "progress", "serde",
    "simulation.simulate", "simulation.sweep", "sizing.calculator", "sizing.compare", "stores",
]  # fmt: skip


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_python_examples_run(page, tmp_path, monkeypatch, capsys):
    """In the order of the page, in one namespace; what is not run says why."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for number, (why, text) in enumerate(blocks(page, "python")):
        if why is None:
            exec(compile(text, f"{name_of(page)}, example {number + 1}", "exec"), names)


@pytest.mark.parametrize("name", FRONT_DOOR)
def test_examples_of_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"kvlab.{name}")).failed == 0


@pytest.mark.slow
def test_the_example_classes_are_judged_by_the_suites(tmp_path):
    """The pages on adding one show a class and a subclass of the suite: together they are a test file that passes."""
    for page in ("add-a-store", "add-a-serde", "add-a-policy", "add-a-transform"):
        code = "\n\n".join(text for _, text in blocks(DOCS / "guide" / f"{page}.md", "python"))
        (tmp_path / f"test_{page.replace('-', '_')}.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "-W", "error", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_tables_of_lmcaches_keys_are_those_of_the_code():
    assert page_tables() in (DOCS / "guide" / "from-lmcache.md").read_text(encoding="utf-8")


def test_the_table_of_commands_has_every_command():
    text = (DOCS / "guide" / "command-line.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `kvlab (\w+)", text, re.MULTILINE) == list(COMMANDS)


def test_the_table_of_settings_has_every_setting():
    text = (DOCS / "guide" / "connector.md").read_text(encoding="utf-8")
    table = text[text.index("## Settings") :].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [field.name for field in fields(ConnectorConfig) if field.init]


def test_the_table_of_metrics_has_every_metric():
    tree = ast.parse((ROOT / "kvlab/connectors/vllm/metrics.py").read_text(encoding="utf-8"))
    tables = {
        node.targets[0].id: set(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("DOCUMENTATION", "TIER_GAUGES", "TIER_COUNTERS")
    }
    assert len(tables) == 3
    named = set().union(*tables.values(), {"loaded_bytes", "load_seconds", "quality_error", "misses"})
    text = (DOCS / "guide" / "connector.md").read_text(encoding="utf-8")
    table = text[text.index("| metric |") : text.index("| reason of a miss |")]
    columns = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    assert set(re.findall(r"`(\w+)(?:\{[^}]*\})?`", columns)) == named


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    def listed(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for each in entry.values() if isinstance(entry, dict) else entry:
                yield from listed(each)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(listed(nav)) == sorted(name_of(page) for page in PAGES)


def test_pages_of_measurements_are_those_of_the_rows():
    done = subprocess.run([sys.executable, ROOT / "scripts/report.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_guide_names_no_commit_and_no_machine():
    for page in (DOCS / "guide").glob("*.md"):
        found = re.findall(
            r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b|\bH[12]00\b", page.read_text(encoding="utf-8")
        )
        assert not found, page.name


def test_every_file_of_rows_is_described():
    described = re.findall(r"`([\w*]+\.(?:csv|jsonl))`", (ROOT / "data" / "README.md").read_text(encoding="utf-8"))
    files = [path.name for path in (ROOT / "data" / "measured").iterdir() if path.is_file()]
    assert [name for name in files if not any(fnmatch(name, pattern) for pattern in described)] == []


def test_the_table_of_floors_is_that_of_the_layering():
    text = (DOCS / "design" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| floor | modules |") :].split("\n\n")[0]
    lines = [re.sub(r"\([^)]*\)", "", line) for line in table.splitlines()[2:]]
    assert [re.findall(r"`(\w+)`", line) for line in lines] == FLOORS
