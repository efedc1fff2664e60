"""A bucket as a tier of a real engine, on a real S3 server."""

import pytest

from kvlab.machine.s3_server import S3Server
from tests.connectors.engine import connector, drain, engine, generate, prompt


@pytest.fixture
def bucket(monkeypatch):
    with S3Server() as server:
        for name, value in server.credentials.items():
            monkeypatch.setenv(name, value)
        yield server


def test_what_one_engine_stores_in_a_bucket_another_loads_until_the_server_dies(bucket, expected):
    url, p = bucket.url_of("team/kv") + "&timeout_ms=60000", prompt(300)
    with engine([url]) as llm:
        assert generate(llm, [p])[0].tokens == expected(p)
        drain(llm)
    with engine([url]) as llm:
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens, answer.row["tier"]) == (299, expected(p), "s3")
        bucket.kill()
        for q in (p, prompt(480), p):
            assert generate(llm, [q])[0].tokens == expected(q)
        assert generate(llm, [p])[0].hit == 0
        assert not connector(llm).hook_errors
