"""Servers as tiers of a real engine: what one stores another loads, until the server dies."""

import pytest

from kvlab.machine.lm_server import LMServer
from kvlab.machine.memcached_server import MemcachedServer
from tests.connectors.engine import connector, drain, engine, generate, prompt

SERVERS = {"lm": LMServer, "memcached": MemcachedServer}


@pytest.mark.parametrize("name", SERVERS)
def test_what_one_engine_stores_on_a_server_another_loads_until_the_server_dies(name, expected):
    p = prompt(300)
    with SERVERS[name]() as server:
        url = f"{server.url}?timeout_ms=60000"
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
