"""vLLM's own benchmark client, ``vllm bench serve``, in a process of its own; its detailed result, read back."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from kvlab.errors import StoreError
from kvlab.machine.processes import Child
from kvlab.serving.server import Server, environment, why

REQUEST_PREFIX = "kvlab-bench-"

# The console command is absent from the CPU build. Its custom datasets want pandas only to read JSON lines.
# A run's result appears under its own name only when the run has ended.
ENTRY = """
import gc, json, os, sys
from importlib.util import find_spec
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.benchmarks.serve import add_cli_args, main
if find_spec("pandas") is None:
    from vllm.benchmarks.datasets import CustomDataset
    def load_data(self):
        with open(self.dataset_path) as lines:
            self.data = [json.loads(line) for line in lines]
    CustomDataset.load_data = load_data
for line in sys.stdin:
    args, result = json.loads(line)
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(args))
    os.rename(result + ".part", result)
    gc.collect()
"""


def arguments(
    server: Server, workload_args: Sequence[str], *, num_prompts: int, request_rate: float, seed: int, ignore_eos: bool
) -> list[str]:
    """What the client is told. Temperature is set, because vLLM's default is the model's and not 0; no request is
    sent before the run, because one would be a prompt of it; no prompt is sent twice to make up the number."""
    args = ["--backend", "openai", "--endpoint", "/v1/completions", "--host", "127.0.0.1", "--port", str(server.port)]
    args += ["--model", server.model, "--num-prompts", str(num_prompts), "--temperature", "0", "--num-warmups", "0"]
    args += ["--ready-check-timeout-sec", "0", "--request-id-prefix", REQUEST_PREFIX, "--disable-tqdm", *workload_args]
    if "--seed" not in workload_args:
        args += ["--seed", str(seed)]
    if "timed_trace" not in workload_args:  # a trace brings its own times
        args += ["--request-rate", str(request_rate)]
    args += ["--ignore-eos"] if ignore_eos else []
    args += ["--no-oversample"] if flag_exists("--no-oversample") else []
    return [*args, "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"]


def flag_exists(flag: str) -> bool:
    """Whether the installed vLLM's benchmark client knows `flag`; looked up in its source, without importing it."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(spec.submodule_search_locations[0]) / "benchmarks"
    return any(f'"{flag}"' in path.read_text(errors="replace") for path in folder.rglob("*.py"))


class Client:
    """A process that has imported the client, which takes half a minute on a slow core, and measures run after run.

    Use as a context manager; start it before the first server, so that importing delays nothing.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Child | None = None

    def __enter__(self) -> Self:
        with self._log.open("ab") as out:
            env = environment({"VLLM_LOGGING_LEVEL": "ERROR"})
            self._process = Child([sys.executable, "-c", ENTRY], out, env, told=True)
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def run(self, server: Server, args: Sequence[str], result: Path, *, timeout_s: float = 3600.0) -> dict[str, Any]:
        """One run against `server`; its result with details. Raises StoreError, in one line, when either dies."""
        process = self._process
        if process is None:
            raise StoreError("the benchmark client is not running")
        part = f"{result.name}.part"
        saved = ["--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", part]
        with contextlib.suppress(BrokenPipeError):  # it has died: told below, with its reason
            process.tell(json.dumps([[*args, *saved], str(result)]))
        deadline = time.monotonic() + timeout_s
        while not result.exists():
            server.check()
            status = process.poll()
            if status is not None and not result.exists():
                raise StoreError(f"the benchmark client ended with status {status}: {why(self._log)}; log: {self._log}")
            if time.monotonic() > deadline:
                raise StoreError(f"the benchmark client did not end within {timeout_s:.0f} s; its log: {self._log}")
            time.sleep(0.1)
        details: dict[str, Any] = json.loads(result.read_text())
        if not details.get("completed"):
            error = next((text for text in details.get("errors", ()) if text), "no reason given")
            raise StoreError(f"no request was answered: {last_line(error)}; the server's log: {server.log}")
        return details


def last_line(error: str) -> str:
    """Of a failed request's text, which may be a traceback, the line that says what was wrong."""
    return (error.strip().splitlines() or ["no reason given"])[-1][:300]


def client_version() -> str:
    """Version of the vLLM that serves and measures; the CPU build goes by another name."""
    code = "import vllm; print(vllm.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else "unknown"
