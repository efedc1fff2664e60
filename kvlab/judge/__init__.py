"""Any KV connector of vLLM, put through traps: does a hit answer as a recompute does?

`judge` runs them and gives a `Report`; ``kvlab judge`` and `kvlab.testing.ConnectorTests` are made of it.
"""

from typing import TYPE_CHECKING

from kvlab.lazy import lazy

if TYPE_CHECKING:
    from kvlab.judge.report import Report as Report
    from kvlab.judge.report import Verdict as Verdict
    from kvlab.judge.run import judge as judge
    from kvlab.judge.subject import Subject as Subject
    from kvlab.judge.traps import TRAPS as TRAPS

_HOME = {
    "judge": "kvlab.judge.run",
    "Report": "kvlab.judge.report",
    "Subject": "kvlab.judge.subject",
    "TRAPS": "kvlab.judge.traps",
    "Verdict": "kvlab.judge.report",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
