"""What a worker tells the scheduler side: taken once a step."""

import logging
from collections.abc import Mapping

from kvlab.connectors.vllm.adapters import ADAPTERS
from kvlab.connectors.vllm.messages import LoadRow, TierRow, WorkerReport
from kvlab.engine import retrieved_line
from kvlab.paged.transfer import Clock

logger = logging.getLogger("vllm.kvlab")


class Reports:
    """The report in the making, and the copies and forward passes whose time is not known yet."""

    def __init__(self) -> None:
        self._report: WorkerReport | None = None  # None: there is nothing to report, as in most steps
        self._under_way: list[tuple[LoadRow, int, Clock]] = []  # loads whose copies have not ended
        self._forwards: list[tuple[int, Clock]] = []  # forward passes that may not have ended

    @property
    def current(self) -> WorkerReport:
        """The report to add to."""
        if self._report is None:
            self._report = WorkerReport()
        return self._report

    def add_forward(self, prefill_tokens: int, clock: Clock) -> None:
        self._forwards.append((prefill_tokens, clock))

    def add_load(self, row: LoadRow, prompt_tokens: int, clock: Clock | None = None) -> None:
        """A request's load; with `clock`, once its copy has ended."""
        if clock is not None:
            self._under_way.append((row, prompt_tokens, clock))
            return
        self.current.rows.append(row)
        line = retrieved_line(row.num_tokens, prompt_tokens, row.num_bytes, row.seconds)
        logger.info("%s (%s) for %s", line, row.tier, row.request_id)

    def add_tiers(self, rows: Mapping[str, TierRow]) -> None:
        for name, row in rows.items():
            self.current.tiers[name] = row.after(self.current.tiers.get(name, TierRow()))

    def take(self) -> WorkerReport | None:
        """What is new since the last call; None if nothing is."""
        if adapters := ADAPTERS.take_news():
            self.current.adapters |= adapters
        if not (self._under_way or self._forwards or self._report):
            return None
        waiting, self._under_way = self._under_way, []
        for row, prompt_tokens, clock in waiting:
            seconds = clock.seconds()
            if seconds is None:
                self.add_load(row, prompt_tokens, clock)
                continue
            row.seconds, row.delay = seconds, clock.delay()
            self.add_load(row, prompt_tokens)
        measured = [(entry, entry[1].seconds()) for entry in self._forwards]
        self._forwards = [entry for entry, seconds in measured if seconds is None]
        forwards = [(entry[0], seconds) for entry, seconds in measured if seconds is not None]
        if forwards:
            self.current.forwards += forwards
        taken, self._report = self._report, None
        return taken
