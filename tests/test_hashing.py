"""Keys: golden values, another process, tags that never collide."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlab.errors import ConfigError
from kvlab.hashing import Namespace, block_hashes

GOLDEN = json.loads((Path(__file__).parent / "golden" / "hashes.json").read_text())
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=80)


def computed() -> dict[str, object]:
    ids = list(range(1000, 1100))
    return {
        "plain": [h.hex() for h in block_hashes(ids, 16)],
        "extras": [h.hex() for h in block_hashes(ids, 32, extras={0: [("cache_salt", "x")], 2: [("mm", "cat@70")]})],
        "namespace": Namespace("Org/Model B", {"dtype": "bfloat16", "block_tokens": 16, "rank": 0}).id,
        "key": Namespace("Org/Model B", {"dtype": "bfloat16"}).key(block_hashes(ids, 16)[-1]),
    }


def test_golden_values():
    assert computed() == GOLDEN


def test_golden_values_in_another_process():
    code = "import json; from tests.test_hashing import computed; print(json.dumps(computed()))"
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, timeout=60)
    assert json.loads(out.stdout) == GOLDEN


@given(tokens, st.integers(1, 20), st.integers(0, 5))
def test_going_on_with_a_chain_gives_the_same(ids, block, at):
    whole = block_hashes(ids, block)
    at = min(at, len(whole))
    rest = block_hashes(ids[at * block :], block, parent=whole[at - 1] if at else None)
    assert whole[:at] + rest == whole
    assert len(whole) == len(ids) // block


@given(tokens, tokens)
def test_different_prefixes_have_different_hashes(a, b):
    for x, y in zip(block_hashes(a, 4), block_hashes(b, 4), strict=False):
        i = block_hashes(a, 4).index(x)
        assert (x == y) == (a[: 4 * (i + 1)] == b[: 4 * (i + 1)])


def test_a_lora_and_a_salt_of_one_name_do_not_collide():
    ids = list(range(64))
    chains = [
        block_hashes(ids, 16, extras={0: extras})
        for extras in (
            [],
            [("lora", "x")],
            [("cache_salt", "x")],
            [("lora", "xcache_salt"), ("", "x")],
            [("lora", "x"), ("cache_salt", "x")],
        )
    ]
    assert len({chain[0] for chain in chains}) == len(chains)
    assert len({chain[-1] for chain in chains}) == len(chains), "an extra binds all later blocks"


def test_namespaces_say_in_what_they_differ():
    a, b = Namespace("m", {"dtype": "bf16", "rank": 0}), Namespace("m", {"dtype": "fp8", "rank": 0})
    assert a.id != b.id
    assert a.differing(json.loads(b.canonical)) == ["dtype"]


@pytest.mark.parametrize("bad", [[-1], [2**32], ["a"], [1.5]])
def test_bad_tokens_are_one_clear_error(bad):
    with pytest.raises(ConfigError, match="token ids must be integers"):
        block_hashes(bad, 1)


def test_a_salt_may_be_any_string():
    odd, plain = block_hashes(range(16), 16, extras={0: [("cache_salt", "\ud800")]}), block_hashes(range(16), 16)
    assert odd != plain
    assert odd != block_hashes(range(16), 16, extras={0: [("cache_salt", "\ud801")]})


@pytest.mark.parametrize("index", ["0", -1, 1.0, True, None])
def test_extras_that_bind_no_block_are_refused(index):
    """Or tenants would share what their salts were to keep apart."""
    with pytest.raises(ConfigError, match="extras must be given by block index"):
        block_hashes(list(range(32)), 16, extras={index: [("cache_salt", "s")]})


@pytest.mark.parametrize("token_ids", [b"abcdefgh", bytearray(8), "text"])
def test_token_ids_are_no_bytes(token_ids):
    with pytest.raises(ConfigError, match="token ids must be"):
        block_hashes(token_ids, 2)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("m", {"tenant": "\ud83d\ude00"}),
        ("\ud800", {}),
        ("m", {"\udc00": 1}),
        ("m", {"model": "x"}),
        ("m", {"format": 1}),
    ],
)
def test_namespaces_that_could_be_anothers_are_refused(model, fields):
    with pytest.raises(ConfigError, match=r"surrogates|kvlab's own"):
        Namespace(model, fields)
