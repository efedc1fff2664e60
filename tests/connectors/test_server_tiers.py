"""Servers as tiers of a real engine: what one stores another loads, until the server dies."""

import pytest

from kvlab.machine.lm_server import LMServer
from kvlab.machine.memcached_server import MemcachedServer
from kvlab.machine.mooncake_server import MooncakeServer
from kvlab.machine.servers import make_importable
from tests.connectors.engine import connector, drain, engine, generate, prompt

SERVERS = {"lm": LMServer, "memcached": MemcachedServer, "mooncake": MooncakeServer}


@pytest.mark.parametrize("name", SERVERS)
def test_what_one_engine_stores_on_a_server_another_loads_until_the_server_dies(name, expected):
    p = prompt(300)
    with SERVERS[name]() as server:
        url = f"{server.url}{'&' if '?' in server.url else '?'}timeout_ms=60000"
        with engine([url]) as llm:
            assert generate(llm, [p])[0].tokens == expected(p)
            drain(llm)
        with engine([url]) as llm:
            answer = generate(llm, [p])[0]
            assert (answer.hit, answer.tokens, answer.row["tier"]) == (299, expected(p), name)
            server.kill()
            for q in (p, prompt(480), p):
                assert generate(llm, [q])[0].tokens == expected(q)
            assert generate(llm, [p])[0].hit == 0
            assert not connector(llm).hook_errors


def test_what_one_engine_stores_by_nixl_another_loads(tmp_path, expected):
    make_importable("nixl", "nixl_cu12")
    url, p = f"nixl://{tmp_path}/kv?size=1GiB", prompt(300)
    with engine([url]) as llm:
        assert generate(llm, [p])[0].tokens == expected(p)
        drain(llm)
    with engine([url]) as llm:
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens, answer.row["tier"]) == (299, expected(p), "nixl")
        for file in (tmp_path / "kv").rglob("*.safetensors"):
            file.write_bytes(b"")
        for q in (p, prompt(480), p):
            assert generate(llm, [q])[0].tokens == expected(q)
        assert not connector(llm).hook_errors
