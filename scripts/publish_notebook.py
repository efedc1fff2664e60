"""Execute notebooks in place and keep what a reader needs: no log noise of libraries, no time stamps.

    python scripts/publish_notebook.py notebooks/00_quickstart.ipynb ...

Figures are stored twice, interactive and as a picture; that needs Chrome or Chromium on this machine.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    env = {**os.environ, "PLOTLY_RENDERER": "plotly_mimetype+png", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    for path in map(Path, sys.argv[1:]):
        jupyter = Path(sys.executable).parent / "jupyter"
        subprocess.run([str(jupyter), "execute", "--inplace", str(path)], check=True, env=env)
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.execution_count = None
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        path.write_text(nbformat.writes(notebook).replace(f"{ROOT}/", "") + "\n", encoding="utf-8")  # no one's folders


if __name__ == "__main__":
    main()
