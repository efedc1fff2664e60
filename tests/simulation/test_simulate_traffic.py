"""Traces are read line by line or refused in one line; made-up traffic is what it says."""

import json

import pytest

from kvlab.errors import ConfigError, FormatError
from kvlab.simulation.generate import KINDS, generate_traffic
from kvlab.simulation.trace_files import load_traffic, save_traffic
from kvlab.simulation.traffic import prompts_of_traffic, traffic_of_prompts

MOONCAKE = {"timestamp": 1500, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
BAILIAN = {
    "chat_id": 159,
    "parent_chat_id": -1,
    "timestamp": 61.114,
    "input_length": 40,
    "output_length": 132,
    "type": "text",
    "turn": 1,
    "hash_ids": [1089, 1090, 6326],
}


def written(tmp_path, *rows):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_formats_are_told_apart(tmp_path):
    mooncake = load_traffic(written(tmp_path, MOONCAKE, {**MOONCAKE, "timestamp": 2500}))
    assert (mooncake.block_tokens, mooncake.requests[0].arrival_s, mooncake.duration_s) == (512, 1.5, 1.0)
    assert mooncake.requests[0].block_ids == mooncake.requests[1].block_ids
    bailian = load_traffic(written(tmp_path, BAILIAN))
    assert (bailian.block_tokens, bailian.requests[0].arrival_s) == (16, 61.114)
    full_only = load_traffic(written(tmp_path, {**BAILIAN, "hash_ids": [1, 2]}))
    assert len(full_only.requests[0].block_ids) == 2


def test_blocks_go_by_their_prefix_even_if_hashes_do_not(tmp_path):
    rows = [{**MOONCAKE, "input_length": 1024, "hash_ids": ids} for ids in ([1, 2], [3, 2], [1, 2])]
    first, second, third = load_traffic(written(tmp_path, *rows)).requests
    assert first.block_ids == third.block_ids
    assert not set(first.block_ids) & set(second.block_ids)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", r"line 2 is not JSON"),
        ("version https://git-lfs.github.com/spec/v1", r"line 2 is not JSON.*Git LFS"),
        ("[1]", r"line 2 must be a JSON object, got list"),
        ({"timestamp": 1}, r"line 2 lacks input_length, output_length, hash_ids"),
        ({**MOONCAKE, "timestamp": "now"}, r"line 2: timestamp must be a number of 0 or more, got 'now'"),
        ({**MOONCAKE, "timestamp": -1}, r"timestamp must be"),
        ({**MOONCAKE, "timestamp": float("nan")}, r"timestamp must be"),
        ({**MOONCAKE, "timestamp": 1499}, r"line 2: timestamp 1499 is before the one above it"),
        ({**MOONCAKE, "input_length": 0}, r"line 2: input_length must be an integer of 1 or more, got 0"),
        ({**MOONCAKE, "input_length": 1.5}, r"input_length must be an integer"),
        ({**MOONCAKE, "output_length": True}, r"output_length must be an integer of 0 or more, got True"),
        ({**MOONCAKE, "hash_ids": "abc"}, r"hash_ids must be a list"),
        ({**MOONCAKE, "hash_ids": [1, 2.5, 3]}, r"hash_ids must be a list of integers or strings"),
        ({**MOONCAKE, "hash_ids": [1]}, r"1100 tokens are 3 blocks of 512, but hash_ids has 1; is block_tokens right"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, says):
    with pytest.raises(FormatError, match=says) as caught:
        load_traffic(written(tmp_path, MOONCAKE, bad))
    assert "\n" not in str(caught.value)
    assert "trace.jsonl line 2" in str(caught.value)


def test_what_is_no_trace(tmp_path):
    with pytest.raises(ConfigError, match="no trace at"):
        load_traffic(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="format must be auto, mooncake or bailian"):
        load_traffic(written(tmp_path, MOONCAKE), "csv")
    with pytest.raises(FormatError, match="holds no request"):
        load_traffic(written(tmp_path, ""))
    with pytest.raises(ConfigError, match="no prompt with a full block"):
        traffic_of_prompts([[1, 2, 3]])


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("reuse", [0.0, 0.3, 0.6, 0.85])
def test_reuse_can_be_set(kind, reuse):
    some = generate_traffic(kind, 1500, reuse=reuse, seed=1)
    assert some.summary()["reuse"] == pytest.approx(reuse, abs=0.03)
    assert list(some.arrivals_s) == sorted(some.arrivals_s)
    assert all(request.num_tokens // 16 == len(request.block_ids) for request in some.requests)


def test_a_seed_gives_the_same_traffic_for_ever():
    """The figures are those of the first time this ran; another machine or Python must find them again."""
    some = generate_traffic("chat", 300, seed=42)
    assert (some.num_unique_blocks, int(some.num_tokens.sum())) == (17963, 577820)
    again, other = generate_traffic("chat", 300, seed=42), generate_traffic("chat", 300, seed=43)
    assert again.requests == some.requests
    assert other.requests != some.requests


def test_kinds_differ():
    rows = {kind: generate_traffic(kind, 500).summary() for kind in KINDS}
    assert rows["document"]["mean_prompt_tokens"] > rows["chat"]["mean_prompt_tokens"]
    for bad in ({"reuse": 1.0}, {"reuse": -0.1}, {"num_requests": 0}, {"block_tokens": 0}, {"requests_per_s": 0}):
        with pytest.raises(ConfigError, match="traffic needs reuse in"):
            generate_traffic("chat", **bad)
    with pytest.raises(ConfigError, match="kind of traffic must be one of"):
        generate_traffic("video")


def test_saved_traffic_comes_back(tmp_path):
    some = generate_traffic("chat", 200, block_tokens=32)
    save_traffic(some, tmp_path / "out.jsonl")
    back = load_traffic(tmp_path / "out.jsonl", block_tokens=32)
    assert back.num_tokens.tolist() == some.num_tokens.tolist()
    assert back.summary()["reuse"] == some.summary()["reuse"]
    assert len(load_traffic(tmp_path / "out.jsonl", block_tokens=32, limit=7).requests) == 7


def test_token_prompts_share_what_the_traffic_shares():
    some = generate_traffic("agent", 60)
    prompts = prompts_of_traffic(some)
    again = traffic_of_prompts(prompts)
    number = {}
    for one, other in zip(some.requests, again.requests, strict=True):
        assert one.num_tokens == other.num_tokens
        assert [number.setdefault(block, len(number)) for block in one.block_ids] == other.block_ids
