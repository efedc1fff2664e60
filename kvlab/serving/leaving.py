"""What stays of a benchmark's temporary folder."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from kvlab.errors import StoreError


class Leaving:
    """Removes a temporary folder at the end; after a failure all but the logs, which its message names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not issubclass(kind, StoreError) or not any(self.folder.glob("*.log")):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix != ".log":
                path.unlink(missing_ok=True)
