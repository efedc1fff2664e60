"""Serving benchmarks: servers with a backend each, the same prompts for all, rows and tables."""

from typing import TYPE_CHECKING

from kvlab.lazy import lazy

if TYPE_CHECKING:
    from kvlab.serving.quality import quality as quality
    from kvlab.serving.runs import run as run
    from kvlab.serving.tables import report as report
    from kvlab.serving.tables import serving_block as serving_block
    from kvlab.serving.warm import warm as warm

_HOME = {
    "quality": "kvlab.serving.quality",
    "run": "kvlab.serving.runs",
    "report": "kvlab.serving.tables",
    "serving_block": "kvlab.serving.tables",
    "warm": "kvlab.serving.warm",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
