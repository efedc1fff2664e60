"""A folder that engines with other settings write to: another chunk size, a key. Each finds its own objects alone."""

import pytest

from tests.connectors.engine import connector, drain, engine, generate, prompt


def answer_of(url, p, **settings):
    """One prompt in an engine of its own; what it saved is in the tier when this returns."""
    with engine([url], **settings) as llm:
        answer = generate(llm, [p])[0]
        drain(llm)
        assert not connector(llm).hook_errors
    return answer


@pytest.mark.parametrize(("one", "other"), [(64, 128), (128, 64)])
def test_chunks_of_another_size_are_not_loaded(tmp_path, expected, one, other):
    p, url = prompt(300), f"file://{tmp_path}?size=1GiB"
    for chunk_tokens, hit in ((one, 0), (other, 0), (one, 299)):
        answer = answer_of(url, p, chunk_tokens=chunk_tokens)
        assert (answer.hit, answer.tokens) == (hit, expected(p))


def test_signed_objects_are_read_with_their_key_alone(tmp_path, expected):
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    plain = f"file://{tmp_path}/kv?size=1GiB"
    p, signed = prompt(300), f"{plain}&auth={key}"
    for url, hit in ((signed, 0), (plain, 0), (signed, 299)):
        answer = answer_of(url, p)
        assert (answer.hit, answer.tokens) == (hit, expected(p))
