"""Execute notebooks in place and keep what a reader needs: no noise, no time stamps, words for pictures.

    python scripts/publish_notebook.py notebooks/00_quickstart.ipynb ...

Figures are stored as pictures, which needs Chrome or Chromium on this machine; they are interactive once a cell is run.
"""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLORS = 256


def is_noise(output: nbformat.NotebookNode) -> bool:
    """Warnings, and progress bars, which are widgets where these are installed."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def describe(output: nbformat.NotebookNode) -> None:
    """Of a figure keep the picture alone, with its title for readers who do not see it and the size it is drawn at: Lab
    would show the picture that stands beside a script at the size of its dots, and runs no script it does not trust."""
    figure = output.get("data", {}).pop("application/vnd.plotly.v1+json", None)
    if figure is not None:
        layout = figure["layout"]
        alt = re.sub(r"<[^>]+>", " ", layout.get("title", {}).get("text", "")).strip()
        size = {name: layout[name] for name in ("width", "height") if name in layout}
        output.metadata["image/png"] = {"alt": alt, **size}
        output.data["image/png"] = smaller(output.data["image/png"])


def smaller(encoded: str) -> str:
    """The same picture in as many colours as a figure has, at a third of the bytes."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    picture.quantize(COLORS, method=Image.Quantize.FASTOCTREE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    env = {**os.environ, "PLOTLY_RENDERER": "plotly_mimetype+png", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    for path in map(Path, sys.argv[1:]):
        jupyter = Path(sys.executable).parent / "jupyter"
        subprocess.run([str(jupyter), "execute", "--inplace", str(path)], check=True, env=env)
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.execution_count = None
                cell.outputs = [output for output in cell.outputs if not is_noise(output)]
                for output in cell.outputs:
                    describe(output)
        path.write_text(nbformat.writes(notebook).replace(f"{ROOT}/", "") + "\n", encoding="utf-8")  # no one's folders


if __name__ == "__main__":
    main()
