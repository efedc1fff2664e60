"""The process that holds the engines: ``python -m kvlab.judge.child JOB``.

JOB is a file of JSON; a line of JSON for each trap is appended to the file that it names, before the trap starts and
when it has ended, so that the judge knows what a process that dies was at.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvlab.judge import engine
from kvlab.judge.answers import Book
from kvlab.judge.report import CRASHED, FAILED, HELD, HUNG, NO_HITS, REFUSED
from kvlab.judge.stage import EnoughError, HungError, Rehearsal, Stage
from kvlab.judge.traps import COMMON, GROUPS, TRAPS

REHEARSE, FILL, JUDGE = "rehearse", "fill", "judge"
AFTER_A_TRAP = 3  # exit status: the engine is of no use any more


@dataclass(frozen=True)
class Job:
    """Traps of one group, played by one engine. `transfer` is None where they are rehearsed."""

    what: str
    group: str
    traps: Sequence[str]
    model: str
    adapters: Sequence[str]
    book: str
    seed: int
    patience_s: float
    transfer: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    storage: str = ""
    out: str = ""
    name: str = ""  # of the subject, where several are judged


class Teller:
    """Appends lines to a file, whole and at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, **line: Any) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


def work(job: Job) -> bool:
    """Play the job's traps; whether another engine may start in this process."""
    tell, book_path, group = Teller(job.out), Path(job.book), GROUPS[job.group]
    book = Book.read(book_path) if book_path.exists() else Book()
    more = group.settings if job.what != REHEARSE else group.reference
    tell(group=job.group, name=job.name, state="starting")
    opened = False
    try:
        with engine.running(job.model, {**COMMON, **more, **job.settings}, job.transfer) as llm:
            opened = True
            for name in job.traps:
                tell(trap=name, name=job.name, state="started")
                row = play(job, llm, book, name)
                tell(trap=name, name=job.name, state="ended", **row)
                if row["verdict"] in (CRASHED, HUNG):
                    return False
        if job.what == REHEARSE:
            book.write(book_path)
    except Exception as error:
        traceback.print_exc()
        if job.what == REHEARSE:
            raise
        if opened:
            tell(name=job.name, state="at the end", why=line_of(error))
            return False
        for name in job.traps:
            tell(trap=name, name=job.name, state="ended", verdict=REFUSED, why=line_of(error))
        return False  # a start that failed leaves globals of vLLM behind
    return True


def play(job: Job, llm: Any, book: Book, name: str) -> dict[str, Any]:
    """One trap; the fields of its verdict."""
    trap, kind, begin = TRAPS[name], Rehearsal if job.what == REHEARSE else Stage, time.monotonic()
    stage = kind(
        llm, book, adapters=job.adapters, seed=f"{job.seed}/{name}", patience_s=job.patience_s,
        storage=Path(job.storage),
    )  # fmt: skip
    verdict = why = ""
    try:
        with engine.overwritten(llm, when_freed=False):  # what another request left in a page may be right by chance
            (trap.before if job.what == FILL and trap.before else trap.play)(stage)
    except EnoughError:
        pass
    except HungError as error:
        verdict, why = HUNG, str(error)
    except Exception as error:
        traceback.print_exc()
        verdict, why = CRASHED, line_of(error)
    found = stage.differences
    if not verdict:
        verdict = FAILED if found else HELD if stage.loaded_tokens or not trap.hits else NO_HITS
    if found:
        others = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        why = "; ".join(filter(None, [why, found[0].shown + others]))
    elif verdict == NO_HITS:
        why = "nothing was loaded"
    elif stage.exact_of:
        why = why or f"{stage.exact} of {stage.exact_of} answers compared to the bit"
    return {
        "verdict": verdict, "why": why, "requests": stage.requests, "loaded_tokens": stage.loaded_tokens,
        "differences": len(found), "first": asdict(found[0]) if found else None, "exact": stage.exact,
        "exact_of": stage.exact_of, "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip


def line_of(error: BaseException) -> str:
    """The innermost cause, in one line; of one that has no text, where it was raised."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    said = re.sub(r"^(\d+ validation errors? for \w+)\n\s*", r"\1: ", str(error).strip())  # pydantic's
    if not said and (frames := traceback.extract_tb(error.__traceback__)):
        said = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
    return f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"[:300]


def main() -> None:
    jobs = [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]
    for job in jobs:
        if not work(job):
            os._exit(AFTER_A_TRAP)  # threads of a connector that hangs would keep the process
    os._exit(0)


if __name__ == "__main__":
    main()
