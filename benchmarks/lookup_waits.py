"""How long does a new request wait for a secondary tier to say what it holds, idle and while that tier is written to?

    python benchmarks/lookup_waits.py [--rows FILE]

One thread stands in for the engine: it computes for 1 ms and waits 4 ms for a GPU, and asks at every sixth step, as the
scheduler does. Another saves objects of 275 tokens of Qwen2.5-7B (15.8 MB) with a pause of 45 ms. *unanswered* is the
share of questions without an answer within the millisecond that the scheduler waits: such a request waits for a step.
*skipped*: as the admission sees it after many misses, no answer is worth waiting for; such a request waits for nothing.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from kvlab.chunking import Chunker
from kvlab.connectors.vllm.scheduler.admission import LoadAdmission
from kvlab.connectors.vllm.scheduler.lookup import Lookup
from kvlab.connectors.vllm.scheduler.requests import RequestState
from kvlab.connectors.vllm.scheduler.residency import Residency
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.engine import CacheEngine
from kvlab.hashing import Namespace
from kvlab.machine.provenance import append_rows
from kvlab.machine.redis_server import RedisServer
from kvlab.stores import open_store

NUM_TOKENS, TOKEN_BYTES = 275, 57344
NAMESPACE = Namespace("model")


def measure(url: str, *, saving: bool, skipped: bool, seconds: float) -> dict[str, object]:
    asked, written = open_store(url), open_store(url)
    engine = CacheEngine(written, namespace=NAMESPACE)
    admission = LoadAdmission()
    if skipped:  # an engine that computes 275 tokens in 8 ms beside a step of 5, and found nothing so far
        admission.is_busy = True
        admission.forward(0, 0.005)
        admission.forward(NUM_TOKENS, 0.013)
        for _ in range(64):
            admission.answered(held=False)
    lookup = Lookup(
        asked, Chunker(), [engine.namespace], 1.0, admission, Residency(SlotIndex(1), keeps_memory=True), Counter()
    )
    kv = [torch.randint(0, 255, (NUM_TOKENS, 28, TOKEN_BYTES // 28), dtype=torch.uint8) for _ in range(4)]
    over, saved = threading.Event(), [0]

    def save() -> None:
        while not over.wait(0.045):
            name = engine.namespace.key(saved[0].to_bytes(32, "big"))
            axes = ("blocks", "layers", "page_bytes")
            engine.save_object(name, kv[saved[0] % 4], axes, first_token=0, end_token=NUM_TOKENS)
            saved[0] += 1

    saver = threading.Thread(target=save)
    if saving:
        saver.start()
    waits, unanswered, end = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(6):
            computed = time.perf_counter() + 0.001
            while time.perf_counter() < computed:
                pass
            time.sleep(0.004)
        at = (10**6 + 100 * len(waits)).to_bytes(16, "big")
        state = RequestState(None, {}, [at + block.to_bytes(16, "big") for block in range(17)])
        start = time.perf_counter()
        unanswered += not lookup.ask(state, None, NUM_TOKENS)
        waits.append((time.perf_counter() - start) * 1e3)
    over.set()
    if saving:
        saver.join()
    lookup.close()
    asked.close()
    written.close()
    return {
        "store": url.partition(":")[0], "saving": int(saving), "skipped": int(skipped), "questions": len(waits),
        "saves": saved[0], "unanswered": round(unanswered / len(waits), 3),
        "median_ms": round(statistics.median(waits), 3),
        "p90_ms": round(statistics.quantiles(waits, n=10)[8], 3), "longest_ms": round(max(waits), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--rows", type=Path, default=Path("data/measured/lookup_waits.csv"))
    options = parser.parse_args()
    with RedisServer("maxmemory 2gb", "maxmemory-policy allkeys-lru") as server:
        for repeat in range(options.repeats):
            for skipped in (False, True):
                for saving in (False, True):
                    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                        for url in (f"file://{folder}?size=2GiB", server.url):
                            row = {"repeat": repeat}
                            row |= measure(url, saving=saving, skipped=skipped, seconds=options.seconds)
                            print(*(f"{name}={value}" for name, value in row.items()), flush=True)
                            append_rows(options.rows, [row], packages=("torch", "redis"))


if __name__ == "__main__":
    main()
