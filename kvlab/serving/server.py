"""vLLM's API server as a subprocess: started, waited for, and always ended with everything it started."""

import json
import os
import re
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from kvlab.errors import ConfigError, StoreError
from kvlab.machine.processes import Child

_TOO_SMALL = re.compile(
    r"(Free memory on device|No available memory for the cache blocks|out of memory|larger than the (available|maximum)"
    r"|less than desired GPU memory|KV cache is needed)"
)
_ERROR = re.compile(r"\b\w*(?:Error|Exception|error): .+")
_WRAPPERS = ("Engine core initialization failed", "Engine process failed", "WorkerProc initialization failed")


class Server:
    """Use as a context manager: it is healthy inside, and gone outside. Or `start` it, `wait` for it and `stop` it.

    `flags` are those of ``python -m vllm.entrypoints.openai.api_server`` beyond model, host and port.
    Raises StoreError with one line when it dies or does not come up in `timeout_s`; ConfigError for a port in use.
    """

    def __init__(
        self,
        model: str,
        flags: Sequence[str] = (),
        *,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.model = model
        self.port = port if port is not None else _free_port()
        self.log = log or Path(tempfile.mkstemp(prefix="kvlab-server-", suffix=".log")[1])
        self.timeout_s = timeout_s
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--uvicorn-log-level", "warning", *flags]
        self.env = environment(env)
        self._process: Child | None = None
        self._deadline = 0.0

    @property
    def session(self) -> int:
        """The process id of the server, which is also the session that its children live in."""
        if self._process is None:
            raise StoreError("the server is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns at once."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise ConfigError(f"port {self.port} is in use; give another, or none for a free one") from error
        with self.log.open("ab") as log:
            self._process = Child(self.command, log, self.env)
        self._deadline = time.monotonic() + self.timeout_s

    def wait(self) -> None:
        """Until it is healthy. Asked by /health alone: a prompt sent to find out would lie in the cache before the
        first run."""
        while time.monotonic() < self._deadline:
            self.check()
            try:
                self.get("/health", timeout_s=2.0)
                return
            except OSError:
                time.sleep(0.25)
        raise StoreError(f"the server was not healthy after {self.timeout_s:.0f} s; its log: {self.log}")

    def stop(self) -> None:
        """End it and its children; safe to call again."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def check(self) -> None:
        """Raise StoreError if it has died."""
        status = self._process.poll() if self._process is not None else None
        if status is not None:
            raise StoreError(f"the server ended with status {status}: {why(self.log)}; its log: {self.log}")

    def get(self, path: str, timeout_s: float = 10.0) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout_s) as answer:
            return str(answer.read().decode())

    def complete(self, token_ids: Sequence[int], max_tokens: int) -> None:
        """Send one prompt of token ids; for warm-ups that share nothing with the workload."""
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": max_tokens, "temperature": 0}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=600).read()
        except (OSError, urllib.error.URLError) as error:
            self.check()
            raise StoreError(f"the server did not answer a warm-up prompt: {error}") from error


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of servers and clients: this kvlab importable, no network look-ups, one hash seed, plain logs.

    The benchmark client keeps idle connections for 60 s. vLLM closes them after 5, and a request that is sent at that
    moment fails: the server keeps them longer than the client.

    On a CPU vLLM keeps one core free of computing, and one more where there is any connector; where that leaves none,
    all compute. Two servers would be given different cores for the same work: each keeps one free, unless told.
    """
    package = str(Path(__file__).resolve().parents[2])
    inherited = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    path = os.pathsep.join(part for part in (package, inherited.get("PYTHONPATH", "")) if part)
    fixed = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        **inherited,
        **fixed,
        "VLLM_LOGGING_LEVEL": "INFO",
        "NO_COLOR": "1",
        **(extra or {}),
    }


def why(log: Path) -> str:
    """The line of a dead server's log that says what was wrong, with advice where the reason is known."""
    lines = log.read_text(errors="replace").splitlines()
    for line in lines:
        if (found := _TOO_SMALL.search(line)) and (error := _ERROR.search(line) or found):
            advice = "use fewer tokens (--max-model-len), a smaller model or a larger device"
            return f"memory too small: {line[error.start() :].strip()[:300]}; {advice}"
    errors = [
        found[0] for line in lines if (found := _ERROR.search(line)) and not any(text in line for text in _WRAPPERS)
    ]
    if errors:
        return errors[-1].strip()[:300]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
