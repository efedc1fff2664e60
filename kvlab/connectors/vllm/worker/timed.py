"""How long forward passes take: of prefills, which the admission of loads is measured against, and of some others."""

from kvlab.connectors.vllm.messages import StepMetadata
from kvlab.connectors.vllm.scheduler.admission import MIN_PREFILL_TOKENS
from kvlab.connectors.vllm.worker.reports import Reports
from kvlab.paged.transfer import Clock, Transfer

TIMED_STEPS = 8  # one in so many of the steps without a prefill is timed


class TimedSteps:
    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._num_decodes = 0  # steps without a prefill
        self._forward: tuple[int, Clock] | None = None  # prefill tokens of this step's forward pass

    def begin(self, metadata: StepMetadata) -> None:
        """The step's forward pass comes next."""
        prefill = metadata.prefill_tokens
        decodes = metadata.num_tokens > 0 and not prefill
        self._num_decodes += decodes
        timed = prefill >= MIN_PREFILL_TOKENS or (decodes and self._num_decodes % TIMED_STEPS == 0)
        self._forward = (prefill, self._transfer.clock()) if timed else None

    def end(self, reports: Reports) -> None:
        """The forward pass has been enqueued."""
        if self._forward is not None:
            self._forward[1].stop()
            reports.add_forward(*self._forward)
            self._forward = None
