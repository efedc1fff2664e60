"""vLLM's own benchmark client, ``vllm bench serve``, as a subprocess; its detailed result, read back."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvlab.bench.processes import Child
from kvlab.bench.server import Server, environment, why
from kvlab.errors import StoreError

REQUEST_PREFIX = "kvlab-bench-"

# The console command is absent from the CPU build. Its custom datasets want pandas only to read JSON lines.
ENTRY = """
import json
from importlib.util import find_spec
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.benchmarks.serve import add_cli_args, main
if find_spec("pandas") is None:
    import random
    from vllm.benchmarks.datasets import CustomDataset
    def load_data(self):
        with open(self.dataset_path) as lines:
            self.data = [json.loads(line) for line in lines]
    CustomDataset.load_data = load_data
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
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


def run_client(server: Server, args: Sequence[str], result: Path, *, timeout_s: float = 3600.0) -> dict[str, Any]:
    """Run the client against `server`; its result with details. Raises StoreError, in one line, when either dies."""
    log = result.with_suffix(".log")
    saved = ["--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name]
    with log.open("ab") as out:
        process = Child([sys.executable, "-c", ENTRY, *args, *saved], out, environment({"VLLM_LOGGING_LEVEL": "ERROR"}))
        try:
            deadline = time.monotonic() + timeout_s
            while process.poll() is None:
                server.check()
                if time.monotonic() > deadline:
                    raise StoreError(f"the benchmark client did not end within {timeout_s:.0f} s; its log: {log}")
                time.sleep(0.1)
        finally:
            process.end()
    status = process.poll()
    if status or not result.exists():
        server.check()
        raise StoreError(f"the benchmark client ended with status {status}: {why(log)}; its log: {log}")
    details: dict[str, Any] = json.loads(result.read_text())
    if not details.get("completed"):
        error = next((text for text in details.get("errors", ()) if text), "no reason given")
        raise StoreError(
            f"no request was answered: {error.strip().splitlines()[-1][:300]}; the server's log: {server.log}"
        )
    return details


def client_version() -> str:
    """Version of the vLLM that serves and measures; the CPU build goes by another name."""
    code = "import vllm; print(vllm.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else "unknown"
