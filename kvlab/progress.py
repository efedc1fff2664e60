"""Progress bars of what takes more than a few seconds. ``TQDM_DISABLE=1`` turns them off, as with any tqdm."""

from types import TracebackType
from typing import Any, Self


class Progress:
    """A bar over `total` steps: what is done, what is left, and by `doing` what runs. Without tqdm nothing is shown.

    >>> with Progress(2, "sizes", unit="model") as bar:
    ...     bar.doing("Qwen2.5-7B")
    ...     bar.step()
    """

    def __init__(self, total: int, what: str, *, unit: str = "step") -> None:
        self._what = what
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:  # comes with the extra `notebook`, and with vllm and transformers
            return
        self._bar = tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True)

    def doing(self, text: str) -> None:
        """Show what runs now."""
        if self._bar is not None:
            self._bar.set_description(f"{self._what}: {text}")

    def step(self, result: str = "") -> None:
        """One step is done; `result` stands behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(result, refresh=False)
            self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
