"""An agent that works on the files of a folder, as a bad disk, another program or a person would."""

import contextlib
import os
import threading
import time
from pathlib import Path

from kvlab.chaos.faults import DELAY, DROP, Faults
from kvlab.errors import ConfigError

SMALL = 8  # files below this part of the largest hold no KV


class FolderAgent:
    """Does one fault after another to the files of `folder` that hold values.

    ``drop`` removes a file; ``delay`` takes it away for `delay_ms`; the others change its content in place. What cannot
    be done, since the cache was faster, is not counted.
    """

    def __init__(self, folder: Path | str, faults: Faults, *, delay_ms: float = 50.0) -> None:
        self.folder, self.faults, self.delay_ms = Path(folder), faults, delay_ms
        if not self.folder.is_dir():
            raise ConfigError(f"chaos needs a folder, got {str(folder)!r}")

    def files(self) -> list[Path]:
        """Those that are there now, but for small ones: indexes, journals, locks."""
        sizes: dict[Path, int] = {}
        for path in sorted(self.folder.rglob("*")):
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    sizes[path] = path.stat().st_size
        largest = max(sizes.values(), default=0)
        return [path for path, size in sizes.items() if size and size * SMALL >= largest]

    def strike(self) -> str:
        """One fault of one file; its kind, or nothing where it was not to be or could not be done."""
        kind, found = self.faults.draw(), self.files()
        if not kind or not found:
            return ""
        path = found[self.faults.choose(len(found))]
        try:
            done = self._do(kind, path)
        except OSError:
            return ""
        if done:
            self.faults.did(kind)
        return kind if done else ""

    def run(self, *, every_ms: float, limit: int = 0, stop: threading.Event | None = None) -> None:
        """Strike every so often, until `stop` is set or `limit` faults are done (0: for ever)."""
        stop = stop or threading.Event()
        while not stop.wait(every_ms / 1e3) and (not limit or self.faults.total < limit):
            self.strike()

    def _do(self, kind: str, path: Path) -> bool:
        if kind == DROP:
            path.unlink()
            return True
        if kind == DELAY:
            aside = path.with_name(f".{path.name}.away")
            path.rename(aside)
            time.sleep(self.delay_ms / 1e3)
            if path.exists():
                aside.unlink()
            else:
                aside.rename(path)
            return True
        value = path.read_bytes()
        spoiled = self.faults.spoil(kind, value)
        self.faults.keep(value)
        if spoiled == value:
            return False
        _write_over(path, spoiled)
        return True


def _write_over(path: Path, value: bytes) -> None:
    """In place: the file stays the one that the cache knows, and may have open."""
    with path.open("r+b") as file:
        file.write(value)
        file.truncate()
        os.fsync(file.fileno())
