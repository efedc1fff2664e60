"""Which LoRA weights are in use? Asked of what was loaded, when it is loaded.

A request names its adapter by an id and a path; the weights in use are those that lay under the path when vLLM loaded
it, which may be long ago. So the worker side watches vLLM load adapters and takes the digest of the files then. An
adapter whose weights cannot be told so is served without the cache.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError
from kvlab.fingerprint import files_fingerprint

logger = logging.getLogger("vllm.kvlab")
SETTLED_NS = 20_000_000  # file times move in steps of up to 10 ms: a second change within one would not show

Stamp = tuple[tuple[str, int, int, int, int], ...]  # of each file: name, size, mtime_ns, ctime_ns, inode


@dataclass(frozen=True)
class LoadedAdapter:
    """What vLLM last loaded under an id, called `name` by the request: `digest`, of the files and how vLLM reads
    them, or None where that cannot be told; the `path` that the request gave, the `folder` that it stands for
    and the `stamp` of its files; `num_loads` counts loads of other weights under this id."""

    name: str
    digest: str | None
    path: str
    folder: str
    stamp: Stamp
    num_loads: int

    def is_as_loaded(self) -> bool:
        """Whether the files are those that were loaded: vLLM may drop an adapter and load it again at any step."""
        return stamp_of(self.folder) == self.stamp

    def agreed(self, other: "LoadedAdapter") -> "LoadedAdapter":
        """What two ranks say of one id, or that it cannot be told."""
        same = (self.digest, self.num_loads) == (other.digest, other.num_loads)
        return self if same else replace(self, digest=None)


class Adapters:
    """The adapters that were loaded in this process, or by its workers, by id. Safe for several threads."""

    def __init__(self) -> None:
        self._loaded: dict[int, LoadedAdapter] = {}
        self._news: dict[int, LoadedAdapter] = {}  # not reported yet
        self._digests: dict[str, set[str | None]] = {}  # all that were loaded under a name
        self._told: set[int] = set()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Another engine starts in this process."""
        with self._lock:
            self._loaded, self._news, self._digests, self._told = {}, {}, {}, set()

    def loading(
        self, load: Callable[[], Any], adapter_id: int, path: str, folder: str | None, reading: str, name: str = ""
    ) -> Any:
        """What `load` answers, which reads the adapter's files in `folder`; `reading` tells how."""
        before = stamp_of(folder)
        if before and time.time_ns() - max(changed for *_, changed, _ in before) < SETTLED_NS:
            time.sleep(SETTLED_NS / 1e9)
            before = stamp_of(folder)
        loaded = load()
        digest: str | None = None
        if folder is not None and before:
            known = self._loaded.get(adapter_id)
            if known is not None and (known.folder, known.stamp) == (folder, before):
                digest = known.digest
            digest = digest or _digest(folder, reading)
            if stamp_of(folder) != before:
                digest = None  # written while it was loaded
        with self._lock:
            known = self._loaded.get(adapter_id)
            same = known is not None and digest is not None and known.digest == digest
            num_loads = (known.num_loads if known else 0) + (not same)
            new = LoadedAdapter(name, digest, path, folder or "", before, num_loads)
            self._news[adapter_id] = new
            self._know(adapter_id, new)
        return loaded

    def learn(self, news: Mapping[int, LoadedAdapter]) -> None:
        """From workers in other processes."""
        with self._lock:
            for adapter_id, loaded in news.items():
                self._know(adapter_id, loaded)

    def _know(self, adapter_id: int, loaded: LoadedAdapter) -> None:
        self._loaded[adapter_id] = loaded
        digests = self._digests.setdefault(loaded.name, set())
        digests.add(loaded.digest)
        if loaded.num_loads > 1:
            digests.add(None)  # others were loaded before

    def is_only_one_called(self, name: str) -> bool:
        """Whether one content alone was ever loaded under this name, by which vLLM's own prefix cache tells adapters
        apart: what it finds may be the KV of another."""
        return len(self._digests.get(name, ())) == 1 and None not in self._digests[name]

    def take_news(self) -> dict[int, LoadedAdapter]:
        """Adapters loaded since the last call."""
        if not self._news:
            return {}
        with self._lock:
            news, self._news = self._news, {}
        return news

    def nameable(self, adapter_id: int, path: str) -> LoadedAdapter | None:
        """The adapter under this id, if the weights that the next step computes with are known: vLLM has loaded it, and
        would load the same again. One that cannot be known is told of once."""
        loaded = self._loaded.get(adapter_id)
        if loaded is None:
            return None
        if loaded.digest is None:
            why = "are not in a local folder, or changed while they were loaded"
        elif loaded.path != path:
            why = "are given by two paths under this id"
        elif not loaded.is_as_loaded():
            why = "changed since they were loaded"
        else:
            return loaded
        if adapter_id not in self._told:
            self._told.add(adapter_id)
            logger.warning(
                "kvlab: the files of LoRA adapter %d %s; its requests go without the cache until it is loaded again",
                adapter_id,
                why,
            )
        return None

    def num_loads(self, adapter_id: int) -> int:
        """How often other weights came under this id."""
        loaded = self._loaded.get(adapter_id)
        return loaded.num_loads if loaded is not None else 0


ADAPTERS = Adapters()  # one for a process, as vLLM's worker is


def watch(manager: type[Any], folder_of: Callable[[str], str]) -> bool:
    """Let ADAPTERS see what vLLM's LoRA manager class loads from now on, where that class is as it is known here;
    `folder_of` is vLLM's own way from a request's path to a folder."""
    original = manager.__dict__.get("_load_adapter")
    if original is None:
        return False
    if hasattr(original, "is_watched"):
        return True

    @functools.wraps(original)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        folder: str | None = None
        try:
            folder = folder_of(lora_request.lora_path)
        except Exception:
            logger.warning("kvlab: the folder of LoRA adapter %d is not known", lora_request.lora_int_id)
        reading = f"{self.lora_config.lora_dtype}/{getattr(lora_request, 'is_3d_lora_weight', None)}"
        asked = lora_request.lora_int_id, lora_request.lora_path
        return ADAPTERS.loading(lambda: original(self, lora_request), *asked, folder, reading, lora_request.lora_name)

    load_adapter.is_watched = True  # type: ignore[attr-defined]
    manager._load_adapter = load_adapter
    return True


def stamp_of(folder: str | None) -> Stamp:
    """The state of the files in `folder`; empty where there are none, or they cannot be looked at."""
    if folder is None:
        return ()
    try:
        stats = [(file.name, file.stat()) for file in _files(folder)]
    except OSError:
        return ()
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats)


def _files(folder: str) -> list[Path]:
    return sorted(file for file in Path(folder).iterdir() if file.is_file())


def _digest(folder: str, reading: str) -> str | None:
    try:
        return f"{files_fingerprint(_files(folder), root=Path(folder)).digest}:{reading}"
    except (ConfigError, OSError):
        return None
