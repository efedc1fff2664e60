"""Each notebook as it lies in git, opened in JupyterLab in a headless browser: no error, and every figure drawn."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
import pytest

from kvlab.machine.processes import Child
from tests.support.browser import Browser, find
from tests.support.lab_packages import closed_to

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.notebook
# Scrolls through the notebook, because Lab renders a cell when it is near, and looks at what stands in the page. Lab
# does not trust a notebook that comes from elsewhere, so of a figure it shows the picture, not the script.
READ = """
(async () => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = await app.commands.execute("docmanager:open", {path: PATH});
  await panel.context.ready;
  const cells = panel.content.widgets, figures = [], errors = [];
  for (let i = 0; i < cells.length; i++) {
    await panel.content.scrollToItem(i).catch(() => {});
    await cells[i].ready;
    const pictures = () => [...cells[i].node.querySelectorAll(".jp-OutputArea-output img")];
    while (pictures().length < FIGURES[i] || pictures().some((picture) => !picture.complete))
      await new Promise((again) => setTimeout(again, 50));
    figures.push(...pictures().map((picture) => ({
      alt: picture.alt, dots: picture.naturalWidth, width: picture.getBoundingClientRect().width,
    })));
    const told = cells[i].node.querySelectorAll("[data-mime-type='application/vnd.jupyter.stderr']"); // errors too
    errors.push(...[...told].map((node) => node.textContent.slice(0, 200)));
  }
  const shown = {figures, errors, cells: cells.length};
  panel.dispose();
  return shown;
})()
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, free_port_of_module):
    """JupyterLab's address: no token, no kernel is started by a reader."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "notebooks")  # Lab writes beside what it opens
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="planted", traceback=["ValueError: planted"])
    cells = [nbformat.v4.new_code_cell("raise ValueError('planted')", outputs=[error])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), home / "notebooks" / "planted.ipynb")
    env = {**os.environ, **closed_to("demo"), "HOME": str(home)}
    env |= {"JUPYTER_PLATFORM_DIRS": "1", "JUPYTER_CONFIG_DIR": str(home / "config")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={free_port_of_module}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={home / 'notebooks'}", "--expose-app-in-browser"]
    command += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    log = home / "lab.log"  # no pipe: a full one that is read no more would stop it
    with log.open("wb") as out:
        process = Child(command, out, env)
    try:
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+|http://localhost:\d+)/lab", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.end()


@pytest.fixture(scope="module")
def free_port_of_module():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page(lab):
    """Lab in a browser, in which one notebook after another is opened, read and closed."""
    with Browser() as page:
        page.open(f"{lab}/lab?reset")
        while not page.value("!!window.jupyterapp"):
            time.sleep(0.2)
        yield page


def figures_of(cell):
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lab_shows_every_figure_and_no_error(path, page):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    figures = [figures_of(cell) for cell in cells]
    looks = [output["metadata"]["image/png"] for some in figures for output in some]
    counts = json.dumps([len(some) for some in figures])
    shown = page.value(READ.replace("PATH", json.dumps(path.name)).replace("FIGURES", counts))
    assert shown["errors"] == []
    assert shown["cells"] == len(cells)
    assert len(shown["figures"]) == len(looks) > 0
    for figure, look in zip(shown["figures"], looks, strict=True):
        assert figure["dots"] >= look["width"], look["alt"]  # it is drawn, and sharp
        assert 300 < figure["width"] <= look["width"], look["alt"]


def test_an_error_that_a_cell_shows_is_found(page):
    shown = page.value(READ.replace("PATH", '"planted.ipynb"').replace("FIGURES", "[0]"))
    assert shown["errors"] == ["ValueError: planted"]


def test_where_no_browser_is_one_line_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    with pytest.raises(RuntimeError, match=r"install one .*BROWSER_PATH"):
        find()
