"""TTFT of a hit by prompt length: recompute, vLLM's own prefix cache (the floor), kvlab, and peers.

    python benchmarks/gpu_ttft.py MODEL [--backends kvlab,lmcache] [--graphs piecewise] [--rows FILE]
    python benchmarks/gpu_ttft.py MODEL --backends none,kvlab-disk,lmcache-disk --folder FOLDER

``kvlab``, ``lmcache`` and ``vllm-offload`` hold the hits in host memory; those called ``-disk`` and ``-redis`` hold
them in a folder and in Redis alone, with a few GiB of host memory on the way; ``kvlab-serve`` in the memory of a
``kvlab serve`` that listens at `--socket`. With the name of a serde at its end, slots and tiers hold what it makes.

One request at a time, one new token, random token ids, weights may be random (`--load-format dummy`): only shapes
matter here. An engine of each backend in a process of its own, all on one GPU: they are asked in turns, as a machine's
times drift by more than backends differ. Reckon with the weights, `--pool` and some 3 GB of its memory for each.
Medians with the spread. `same_tokens` is the share of hits that answer what the prompt was answered when it was
computed: 1 but for rounding where KV was loaded, and by chance only where a backend claims hits and loads nothing.
`load_gb_per_s` is how fast kvlab's copies ran, to their end.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from kvlab.machine.provenance import append_rows
from kvlab.units import parse_bytes

TIERS = ("kvlab-disk", "lmcache-disk", "kvlab-redis", "lmcache-redis", "kvlab-serve")
CODED = tuple(f"kvlab-{serde}" for serde in ("int8", "fp8", "int4"))
CODED_TIERS = tuple(f"kvlab-{tier}-{serde}" for tier in ("disk", "redis") for serde in ("lossless", "int8", "int4"))
BACKENDS = ("none", "vllm-prefix", "kvlab", "lmcache", "vllm-offload", *TIERS, *CODED, *CODED_TIERS)
LENGTHS = (776, 2048, 8192, 15000)
PROMPTS = 4  # of each length
HOST_GIB = 8  # of each cache


def transfer_config(backend: str, options: argparse.Namespace):
    from vllm.config import KVTransferConfig

    import kvlab

    if backend in ("kvlab-disk", "kvlab-redis", "kvlab-serve", *CODED_TIERS):
        _, name, serde = (*backend.split("-"), "naive")[:3]
        disk = f"file://{options.folder.resolve()}/{backend}?size=64GiB" if options.folder else ""
        tier = {"disk": disk, "redis": options.redis, "serve": f"kvlab://{options.socket}"}[name]
        if serde != "naive":
            tier += f"{'&' if '?' in tier else '?'}serde={serde}"
        alone = {"admission": False, "staging": "4GiB", "lookup_timeout_ms": 10_000}
        return KVTransferConfig(**kvlab.vllm_config([tier], report=True, **alone))
    if backend in ("lmcache-disk", "lmcache-redis"):
        os.environ |= {"LMCACHE_LOCAL_CPU": "False", "LMCACHE_MAX_LOCAL_CPU_SIZE": "4", "LMCACHE_CHUNK_SIZE": "256"}
        if backend == "lmcache-disk":
            folder = f"file://{options.folder.resolve()}/lmcache/"
            os.environ |= {"LMCACHE_LOCAL_DISK": folder, "LMCACHE_MAX_LOCAL_DISK_SIZE": "64"}
        else:
            os.environ |= {"LMCACHE_REMOTE_URL": options.redis, "LMCACHE_REMOTE_SERDE": "naive"}
        return KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")

    if backend in ("kvlab", *CODED):
        serde = backend.partition("-")[2] or "naive"
        return KVTransferConfig(**kvlab.vllm_config([f"memory://?size={HOST_GIB}GiB&serde={serde}"], report=True))
    if backend == "lmcache":
        size = {"LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": str(HOST_GIB), "LMCACHE_CHUNK_SIZE": "256"}
        os.environ |= size
        return KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    if backend == "vllm-offload":
        extra = {"cpu_bytes_to_use": HOST_GIB << 30}
        return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    return None


def start(options: argparse.Namespace, backend: str):
    """An engine in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    return LLM(
        options.model,
        load_format=options.load_format,
        tensor_parallel_size=options.ranks,
        enforce_eager=options.graphs == "none",
        compilation_config={"cudagraph_mode": "PIECEWISE"} if options.graphs == "piecewise" else None,
        max_model_len=max(options.lengths) + 64,
        gpu_memory_utilization=0.1,  # must be free at the start; `pool` says what is used
        kv_cache_memory_bytes=parse_bytes(options.pool),
        # vLLM's offloading works behind its prefix cache; that one is emptied before each repeat instead.
        enable_prefix_caching=backend in ("vllm-prefix", "vllm-offload"),
        skip_tokenizer_init=True,
        kv_transfer_config=transfer_config(backend, options),
    )


def arguments(rows: str, repeats: int, backends: str) -> argparse.Namespace:
    """The command line of this benchmark and of gpu_ttft_profile.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--backends", type=lambda names: names.split(","), default=backends.split(","))
    parser.add_argument("--lengths", type=lambda ns: [int(n) for n in ns.split(",")], default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--graphs", choices=["none", "piecewise", "full"], default="none", help="CUDA graphs")
    parser.add_argument("--pool", default="5GiB", help="KV cache on the GPU; holds four prompts of the greatest length")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel, on as many GPUs")
    parser.add_argument("--folder", type=Path, help="of the -disk backends")
    parser.add_argument("--socket", default="/tmp/kvlab.sock", help="of a running `kvlab serve`")
    parser.add_argument("--redis", default="redis://127.0.0.1:6379", help="of the -redis backends")
    parser.add_argument("--rows", type=Path, default=Path("data/measured") / rows)
    parser.add_argument("--serve", choices=BACKENDS, help=argparse.SUPPRESS)  # one backend, asked over pipes
    options = parser.parse_args()
    unknown = set(options.backends) - set(BACKENDS)
    if unknown:
        parser.error(f"unknown backends {sorted(unknown)}; known: {', '.join(BACKENDS)}")
    if options.folder is None and any("-disk" in name for name in options.backends):
        parser.error("give --folder for the backends on disk")
    return options


def prompt(length: int, number: int) -> list[int]:
    rng = random.Random(f"{length} {number}")
    return [rng.randrange(1000, 40000) for _ in range(length)]


def serve(options: argparse.Namespace) -> None:
    """Answer lines `length number` with milliseconds, the token, and the bytes and seconds of kvlab's loads so far."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints must not get between the answers
    llm = start(options, options.serve)
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    connector = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "connector", None)
    counters = connector.scheduler.counters if options.serve.startswith("kvlab") else {}
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        ids = prompt(*map(int, line.split()))
        if options.serve == "vllm-offload":
            llm.reset_prefix_cache()
        begin = time.perf_counter()
        answer = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        loaded = counters.get("loaded_bytes", 0), counters.get("load_seconds", 0.0)
        print(json.dumps([seconds * 1e3, answer[0].outputs[0].token_ids[0], *loaded]), file=answers, flush=True)
    if options.serve.startswith("kvlab"):
        print(dict(counters), connector.hook_errors, flush=True)


class Backend:
    """One engine in a process of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
        env = {**os.environ, "PYTHONHASHSEED": "0"}  # LMCache's ranks name tokens by Python's hash
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self._process.wait()}; what it said stands above")
        return line

    def ask(self, length: int, number: int) -> list:
        print(length, number, file=self._process.stdin, flush=True)
        return json.loads(self.answer())

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # LMCache's threads outlive its engine by minutes
            self._process.kill()


def measure(backends: list[Backend], length: int, options: argparse.Namespace) -> list[dict]:
    repeats, graphs = options.repeats, options.graphs
    tokens = {each.name: [each.ask(length, at)[1] for at in range(PROMPTS)] for each in backends}
    time.sleep(1.0)
    loaded = {each.name: [each.ask(length, at)[2:] for at in range(PROMPTS)][-1] for each in backends}
    asked: dict[str, list[list]] = {each.name: [] for each in backends}
    for turn in range(repeats):
        first = turn % len(backends)
        for each in backends[first:] + backends[:first]:
            asked[each.name].append(each.ask(length, turn % PROMPTS))
    rows = []
    for name, answers in asked.items():
        times = [milliseconds for milliseconds, *_ in answers]
        num_bytes, seconds = (now - then for now, then in zip(answers[-1][2:], loaded[name], strict=True))
        row = {
            "backend": name, "tokens": length, "ttft_ms_median": round(statistics.median(times), 2),
            "ttft_ms_min": round(min(times), 2), "ttft_ms_max": round(max(times), 2), "repeats": repeats,
            "graphs": graphs, "together": len(backends),
            "same_tokens": round(statistics.mean(a[1] == tokens[name][i % PROMPTS] for i, a in enumerate(answers)), 3),
            "load_gb_per_s": round(num_bytes / seconds / 1e9, 2) if seconds else "",
            **({"ranks": options.ranks} if options.ranks > 1 else {}),
        }  # fmt: skip
        rows.append(row)
        print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    options = arguments("gpu_ttft.csv", 40, "none,vllm-prefix,kvlab,lmcache,vllm-offload")
    if options.serve:
        serve(options)
        return
    backends = [Backend(name) for name in options.backends]
    try:
        for each in backends:
            each.answer()
            print(f"{each.name} is ready", flush=True)
        import torch  # noqa: F401  # for the GPU's name in the rows

        for length in options.lengths:
            rows = measure(backends, length, options)
            append_rows(options.rows, rows)
    finally:
        for each in backends:
            each.close()


if __name__ == "__main__":
    main()
