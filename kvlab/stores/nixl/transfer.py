"""Transfers between memory and a file by NIXL: asked for, then watched until they end or a deadline passes.

Nearly every failure is one error of NIXL's, so lengths are checked by the store. A transfer that is late goes on with
memory and a descriptor that are its own, which are let go of when it has ended.
"""

import os
import threading
import time
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kvlab.errors import ConfigError, StoreError
from kvlab.hostmemory import PAGE, address, aligned
from kvlab.stores.cuda_library import require_cuda
from kvlab.stores.forks import ForkAware

PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
PLUGINS = ("POSIX", "GDS", "GDS_MT")
OF_GPU = frozenset({"GDS", "GDS_MT"})
MOST_LATE = 16  # transfers; others fail at once then
_FIRST_WAIT_S, _LONGEST_WAIT_S = 20e-6, 200e-6


def library() -> Any:
    """The module of NIXL's Python API. ConfigError, in one line, where it is missing or cannot be loaded."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    for package in PACKAGES:
        if find_spec(package) is None:
            continue
        try:
            return import_module(f"{package}._api")
        except ImportError as error:
            raise ConfigError(f"nixl:// cannot load NIXL: {error}") from error
    raise ConfigError("nixl:// needs NIXL: pip install '/path/to/kvlab[nixl]'")


class Transfers(ForkAware):
    """Of one plugin. An agent belongs to the process that made it; a forked child makes one of its own."""

    def __init__(self, plugin: str, timeout_s: float) -> None:
        if plugin in OF_GPU:
            require_cuda(f"nixl:// with plugin={plugin}")
        self._module = library()
        self._plugin = plugin
        self._timeout_s = timeout_s
        self._agent: Any = None
        self._late: list[_Transfer] = []
        self._parents: list[Any] = []  # what belongs to the parent is not even destroyed
        self._lock = threading.Lock()
        self._rooms: list[memoryview] = []
        self.watch_forks()
        self._of_this_process()

    def after_fork_in_child(self) -> None:
        self._parents += [self._agent, self._late]
        self._agent, self._late, self._lock = None, [], threading.Lock()

    def run(self, operation: str, memory: memoryview, fd: int) -> None:
        """READ or WRITE all of `memory`, which is of `room`, at the file's start. StoreError with reason `timeout`, or
        `backend` for whatever NIXL names no reason of."""
        agent = self._of_this_process()
        transfer = _Transfer(agent, operation, memory, os.dup(fd))
        end, wait_s = time.monotonic() + self._timeout_s, _FIRST_WAIT_S
        try:
            while not transfer.ended():
                if time.monotonic() > end:
                    with self._lock:
                        self._late.append(transfer)
                    raise StoreError(f"NIXL did not {operation.lower()} in {self._timeout_s} s", reason="timeout")
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        except BaseException:
            if transfer not in self._late:
                transfer.close()
            raise
        transfer.close()

    def room(self, size: int) -> memoryview:
        """Aligned memory of whole pages, at least `size` bytes; to be given back unless a transfer of it is late."""
        length = max(PAGE, -(-size // PAGE) * PAGE)
        with self._lock:
            fitting = [room for room in self._rooms if room.nbytes >= length]
            if fitting:
                room = min(fitting, key=lambda room: room.nbytes)
                self._rooms.remove(room)
                return room
        return aligned(length)

    def give_back(self, room: memoryview) -> None:
        with self._lock:
            if len(self._rooms) < 4:
                self._rooms.append(room)

    def _of_this_process(self) -> Any:
        with self._lock:
            for transfer in list(self._late):
                with suppress(StoreError):
                    if not transfer.ended():
                        continue
                self._late.remove(transfer)
                transfer.close()
            if len(self._late) >= MOST_LATE:
                raise StoreError(f"{len(self._late)} transfers hang already", reason="timeout")
            if self._agent is None:
                self._agent = self._new_agent()
            return self._agent

    def _new_agent(self) -> Any:
        module = self._module
        strict = module.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT  # without it an agent is for one thread
        config = module.nixl_agent_config(backends=[], enable_prog_thread=False, sync_mode=strict)
        try:
            agent = module.nixl_agent(f"kvlab-{os.getpid()}-{id(self)}", config)
            agent.create_backend(self._plugin, {})
        except Exception as error:  # classes of the library's own
            raise ConfigError(
                f"nixl:// cannot use the plugin {self._plugin}: {type(error).__name__} {error}"
            ) from error
        return agent


class _Transfer:
    def __init__(self, agent: Any, operation: str, memory: memoryview, fd: int) -> None:
        self._agent, self._memory, self._fd = agent, memory, fd
        self._registered: list[Any] = []
        self._handle: Any = None
        place, size = address(memory), memory.nbytes
        try:
            self._registered.append(agent.register_memory([(place, size, 0, "")], "DRAM"))
            self._registered.append(agent.register_memory([(0, size, fd, "")], "FILE"))
            ours, theirs = (
                agent.get_xfer_descs([(place, size, 0)], "DRAM"),
                agent.get_xfer_descs([(0, size, fd)], "FILE"),
            )
            self._handle = agent.initialize_xfer(operation, ours, theirs, agent.name)
            self._state = agent.transfer(self._handle)
        except Exception as error:
            self.close()
            raise _failure(error) from error

    def ended(self) -> bool:
        if self._state == "PROC":
            try:
                self._state = self._agent.check_xfer_state(self._handle)
            except Exception as error:
                self._state = "ERR"
                raise _failure(error) from error
        if self._state not in ("DONE", "PROC"):
            raise StoreError(f"NIXL ended a transfer with {self._state}", reason="backend")
        return bool(self._state == "DONE")

    def close(self) -> None:
        with suppress(Exception):
            if self._handle is not None:
                self._agent.release_xfer_handle(self._handle)
        for registered in reversed(self._registered):
            with suppress(Exception):
                self._agent.deregister_memory(registered)
        os.close(self._fd)
        self._registered, self._handle = [], None


def _failure(error: Exception) -> StoreError:
    return StoreError(f"NIXL failed: {type(error).__name__} {error}; it names no reason", reason="backend")
