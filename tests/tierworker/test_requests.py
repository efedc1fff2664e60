"""What a peer asks for is checked, field by field."""

import itertools
import random

import pytest

from kvlab.tierworker.link import LinkError
from kvlab.tierworker.messages import Ask, Fill, Memory, Opening, Write, ask_of, message_of, place_of, runs_of

NAME = "ab" * 16
FILL = Fill(1, 0, "", NAME, ((0, 2), (5, 1)), 0, 96)
WRITE = Write(2, 1, "v1", NAME, ((3, 4),), 32, 96, generation=7, after=3)
SIZES = {"num_slots": 8, "num_ranks": 2}
JUNK = [
    None,
    -1,
    1.5,
    True,
    "1",
    [],
    {},
    1 << 60,
    [[0, 0]],
    [[-1, 2]],
    [[0, 1 << 60]],
    [[7, 2]],
    [[0, 8], [0, 1]],
    "zz" * 16,
]


def as_json(message):
    return {name: [list(run) for run in value] if name == "runs" else value for name, value in message.items()}


@pytest.mark.parametrize("request_", [FILL, WRITE], ids=["fill", "write"])
def test_a_request_is_read_as_it_was_sent(request_):
    assert place_of(as_json(message_of(request_)), **SIZES) == request_


@pytest.mark.parametrize(
    "name", ["id", "rank", "version", "hash", "runs", "first_token", "end_token", "generation", "after"]
)
def test_a_field_that_is_otherwise_is_refused(name):
    good = as_json(message_of(WRITE))
    place_of(good, **SIZES)
    refused = 0
    for junk in [*JUNK, "missing"]:
        message = {**good, name: junk}
        if junk == "missing":
            del message[name]
        try:
            place = place_of(message, **SIZES)
        except LinkError:
            refused += 1
        else:
            assert all(first >= 0 and count > 0 and first + count <= 8 for first, count in place.runs)
            assert (name, junk) in [("version", "1"), ("version", "zz" * 16)]
    assert refused >= len(JUNK) - 1


def test_a_question_must_fit_its_bytes():
    ask, hashes, last, flags = ask_of(message_of(Ask(1, "", 2, 3, True)), bytes(range(64)) + b"\1\0\1")
    assert (ask.num_hashes, len(hashes), last, flags) == (3, 3, bytes(range(48, 64)), b"\1\0\1")
    for data in (b"", bytes(66), bytes(68), bytes(51)):
        with pytest.raises(LinkError):
            ask_of(message_of(Ask(1, "", 2, 3, True)), data)
    with pytest.raises(LinkError):
        ask_of(message_of(Ask(1, "", 0, 0, False)), b"")


def test_the_first_message_and_memory_are_checked():
    opening = Opening(["file:///x"], "naive", None, [{"model": "m", "fields": {}}])
    assert Opening.of(message_of(opening)) == opening
    assert Memory.of(message_of(Memory(3, 2, 4096))) == Memory(3, 2, 4096)
    for message in ({}, {"tiers": 1, "serde": "", "auth": None, "namespaces": []}, {"op": "opening", "other": 1}):
        with pytest.raises(LinkError):
            Opening.of(message)
    for size in (0, -1, 1 << 41, 1.5, None):
        with pytest.raises(LinkError):
            Memory.of({"num_slots": size, "layers": 1, "page_bytes": 4096})


def test_slots_become_runs():
    for seed in range(200):
        rng = random.Random(seed)
        slots = rng.sample(range(40), rng.randrange(1, 40))
        if rng.random() < 0.5:
            slots.sort()
        runs = runs_of(slots)
        assert [slot for first, count in runs for slot in range(first, first + count)] == slots
        assert all(a[0] + a[1] != b[0] for a, b in itertools.pairwise(runs))
