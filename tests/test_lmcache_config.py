"""LMCache's settings as kvlab's."""

import json

import pytest

from kvlab.__main__ import main
from kvlab.cli.lmcache import ALIASES, MAPPED, UNKNOWN, UNMAPPED, reason, translate
from kvlab.connectors.config import ConnectorConfig, vllm_config
from kvlab.errors import ConfigError

YAML = """
chunk_size: 512
local_cpu: true
max_local_cpu_size: 20
local_disk: "file:///mnt/kv/"
max_local_disk_size: 100.5
remote_url: "redis://host:6379"
remote_serde: "naive"
cache_policy: "LFU"
save_decode_cache: true
save_unfull_chunk: true
min_retrieve_tokens: 0
lookup_timeout_ms: 3000
blocking_timeout_secs: 10
enable_blending: false
extra_config: {use_odirect: true}
"""
FIRST = "memory://?size=5GiB"
TIERS = ["memory://?size=20GiB&policy=lfu", "file:///mnt/kv?size=100.5GiB&policy=lfu", "redis://host:6379"]
SETTINGS = {
    "chunk_tokens": 512,
    "save_generated": True,
    "save_partial_block": True,
    "min_hit_tokens": 1,
    "lookup_timeout_ms": 3000,
    "load_timeout_ms": 10_000,
}


def test_a_file_and_variables_give_one_configuration(tmp_path, monkeypatch, capsys):
    (tmp_path / "lm.yaml").write_text(YAML)
    assert main(["config", "from-lmcache", str(tmp_path / "lm.yaml")]) == 0
    out = capsys.readouterr()
    made = json.loads(out.out)
    assert made == vllm_config(TIERS, **SETTINGS)
    assert [line.partition(":")[0] for line in out.err.splitlines()] == ["enable_blending", "extra_config"]
    for line in YAML.strip().splitlines():
        key, _, value = line.partition(": ")
        monkeypatch.setenv(f"LMCACHE_{key.upper()}", value.strip('"'))
    assert main(["config", "from-lmcache", "--env"]) == 0
    assert json.loads(capsys.readouterr().out) == made


def test_the_file_that_the_environment_names_is_read_and_variables_go_over_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "lm.yaml").write_text("chunk_size: 512\nmax_local_cpu_size: 20\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "lm.yaml"))
    for size, over in (("20", ""), ("30", "30")):
        monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", over)
        assert main(["config", "from-lmcache", "--env"]) == 0
        out = capsys.readouterr()
        assert json.loads(out.out) == vllm_config([f"memory://?size={size}GiB"], chunk_tokens=512)
        assert out.err == ""
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", "/absent.yaml")
    assert main(["config", "from-lmcache", "--env"]) == 2
    assert "cannot read '/absent.yaml'" in capsys.readouterr().err


def test_its_defaults_are_a_tier_of_5_gib():
    done = translate({"chunk_size": "256"})
    assert (done.tiers, done.settings, done.left_out) == ([FIRST], {"chunk_tokens": 256}, [])


@pytest.mark.parametrize(
    ("given", "tiers", "told"),
    [
        ({"local_cpu": False, "local_disk": "/kv", "max_local_disk_size": 2}, ["file:///kv?size=2GiB"], ""),
        ({"local_disk": "/a,/b", "max_local_disk_size": 2}, [FIRST, "file:///a?size=2GiB"], "one folder"),
        ({"local_disk": "/a"}, [FIRST], "holds nothing without max_local_disk_size"),
        ({"remote_url": "lm://host:1"}, [FIRST, "lm://host:1"], ""),
        ({"remote_url": "hf3fs://host:1"}, [FIRST], "no backend hf3fs://"),
        ({"remote_url": "mooncakestore://h:50051/"}, [FIRST, "mooncake://h:50051"], "?protocol="),
        (
            {"remote_url": "s3://kv-cache.s3.eu-west-1.amazonaws.com", "extra_config": {"s3_num_io_threads": 8}},
            [FIRST, "s3://kv-cache?region=eu-west-1"],
            "LMCache's own: s3_num_io_threads",
        ),
        (
            {"remote_url": "s3://kv-cache.host:9000", "extra_config": '{"s3_region": "r1", "disable_tls": true}'},
            [FIRST, "s3://kv-cache?region=r1&endpoint=http://host:9000"],
            "credentials",
        ),
        ({"remote_url": "valkey://h:1"}, [FIRST, "redis://h:1"], ""),
        ({"remote_url": "fs://h:0/shared"}, [FIRST, "file:///shared?size=100GiB&shared=true"], "100GiB"),
        ({"remote_url": "redis://:secret@h:1"}, [FIRST, "redis://h:1"], "KVLAB_REDIS_PASSWORD"),
        ({"remote_url": "redis://me:secret@h:1"}, [FIRST, "redis://h:1"], "redis://USER@h:1"),
        ({"remote_serde": "cachegen"}, [FIRST], "naive takes its place"),
        ({"cache_policy": "SIEVE"}, [FIRST], "no policy 'sieve'"),
        ({"save_unfull_chunk": "false"}, [FIRST], "save_unfull_chunk"),
        ({"nixl_role": "sender"}, [FIRST], "nixl_role: prefill and decode in one engine"),
        ({"zork": 1}, [FIRST], "zork: no key of LMCache that is known here"),
        ({"chunk_sizes": 1}, [FIRST], "chunk_sizes: no key of LMCache that is known here; do you mean chunk_size?"),
    ],
)
def test_what_has_no_counterpart_is_told(given, tiers, told):
    done = translate(given)
    assert done.tiers == tiers
    assert bool(done.left_out) == bool(told)
    assert told in "\n".join(done.left_out)
    assert "secret" not in "\n".join([*done.tiers, *done.left_out])
    assert vllm_config(done.tiers, **done.settings)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"local_cpu": "maybe"}, "local_cpu of LMCache must be true or false"),
        ({"chunk_size": "many"}, "chunk_size of LMCache must be a number"),
        ({"chunk_size": 25.5}, "chunk_size of LMCache must be a whole number"),
        ({"local_cpu": False}, "no tier is left"),
        ({"extra_config": "[1"}, "extra_config is no YAML"),
    ],
)
def test_a_wrong_value_is_one_line(given, words):
    with pytest.raises(ConfigError, match=words):
        translate(given)


def test_a_file_that_is_none_is_one_line(tmp_path, capsys):
    for text, words in (("[1", "is no YAML"), ("- 1", "must hold settings"), ("", "must hold settings")):
        (tmp_path / "x.yaml").write_text(text)
        assert main(["config", "from-lmcache", str(tmp_path / "x.yaml")]) == 2
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1


def test_every_key_has_one_place():
    assert not set(MAPPED) & set(UNMAPPED)
    assert all(not reason(key).startswith(UNKNOWN) for key in ALIASES.values())
    settings = {name for name in SETTINGS} | {"staging", "tiers"}
    assert settings <= {field for field in ConnectorConfig.__dataclass_fields__}


def test_a_chunk_that_no_block_divides_is_told(capsys):
    assert main(["config", "1GiB", "chunk_tokens=100"]) == 0
    assert "no multiple of 16" in capsys.readouterr().err
    assert main(["config", "1GiB", "gpu_staging=lots"]) == 2
    assert "gpu_staging: size must be" in capsys.readouterr().err
