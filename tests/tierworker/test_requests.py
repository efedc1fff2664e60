"""What a peer asks for is checked, field by field."""

import itertools
import random

import pytest

from kvlab.hashing import Namespace
from kvlab.stores.memory import MemoryStore
from kvlab.tierworker import questions
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


OPENING = message_of(Opening(["file:///x"], "int4", "/etc/key", [{"model": "m", "fields": {"rank": 0, "lora": None}}]))
PAGE_MAP = {"name": "x", "element": "float16", "page_bytes": 4096, "planes": [[[0, 8], [0, 4], [0, 2]]] * 2}
MEMORY = {**message_of(Memory(3, 2, 4096)), "page_map": PAGE_MAP}


@pytest.mark.parametrize("name", ["tiers", "serde", "auth", "namespaces", "slots"])
@pytest.mark.parametrize(
    "junk", [3, True, 1.5, {}, [5], [None], [[]], [{"model": 1, "fields": {}}], "x" * 5000, "\0", ""]
)
def test_a_field_of_the_opening_that_is_otherwise_is_refused(name, junk):
    """A number for a path would be an open file of the server."""
    assert Opening.of(OPENING) == Opening(["file:///x"], "int4", "/etc/key", OPENING["namespaces"])
    if (name, junk) in [("serde", ""), ("slots", "")]:
        junk = 7
    with pytest.raises(LinkError):
        Opening.of({**OPENING, name: junk})


@pytest.mark.parametrize(
    "namespace",
    [
        {},
        {"model": "m"},
        {"model": "m", "fields": 1},
        {"model": "m", "fields": {"a": []}},
        {"model": "m", "fields": {"a": 1.5}},
    ],
)
def test_namespaces_are_checked_inside(namespace):
    for namespaces in ([namespace], [], OPENING["namespaces"] * 1025):
        with pytest.raises(LinkError):
            Opening.of({**OPENING, "namespaces": namespaces})


def test_a_page_map_is_checked_before_anything_is_made_of_it():
    assert Memory.of(MEMORY).num_elements == 16
    long = [[0] * 300] * 3  # a short message for 27 million elements
    for name, junk in [
        ("name", 5), ("element", ["float16"]), ("page_bytes", 8192), ("page_bytes", 10**14), ("page_bytes", "4096"),
        ("planes", []), ("planes", {}), ("planes", [[[0], [0]]]), ("planes", [[[0], [0], ["0"]]]),
        ("planes", [[0, 0, 0]]),
        ("planes", [long]), ("planes", [[[0], [0], [True]]]), ("planes", [[[0], [0], [0]]] * 3),
    ]:  # fmt: skip
        with pytest.raises(LinkError):
            Memory.of({**MEMORY, "page_map": {**PAGE_MAP, name: junk}})
    for junk in (5, [], "x", {}, {**PAGE_MAP, "more": 1}):
        with pytest.raises(LinkError):
            Memory.of({**MEMORY, "page_map": junk})
    with pytest.raises(LinkError):
        Memory.of({**MEMORY, "page_bytes": 1 << 30, "page_map": {**PAGE_MAP, "page_bytes": 1 << 30, "planes": [long]}})


def test_a_question_ends_with_its_session_and_has_bounds():
    hashes = [number.to_bytes(16, "big") for number in range(10 * questions.PIECE)]
    asked = []

    class Asked(MemoryStore):
        def contains_many(self, keys):
            asked.append(len(keys))
            return super().contains_many(keys)

    about = {"store": Asked(1 << 20), "is_unfit": lambda key: False}
    few, many = ([Namespace("m", {"rank": rank}) for rank in range(number)] for number in (2, 1024))
    ask = Ask(7, "", 1, len(hashes), False)
    given = (hashes, None, bytes(len(hashes)))
    with pytest.raises(questions.UnwantedError):
        questions.answer(ask, *given, namespaces=few, is_wanted=lambda: len(asked) < 3, **about)
    assert asked == [questions.PIECE] * 3
    told, _ = questions.answer(ask, *given, namespaces=many, is_wanted=lambda: True, **about)
    assert told["id"] == 7
    assert "more than" in told["error"]
    assert len(asked) == 3


def test_slots_become_runs():
    for seed in range(200):
        rng = random.Random(seed)
        slots = rng.sample(range(40), rng.randrange(1, 40))
        if rng.random() < 0.5:
            slots.sort()
        runs = runs_of(slots)
        assert [slot for first, count in runs for slot in range(first, first + count)] == slots
        assert all(a[0] + a[1] != b[0] for a, b in itertools.pairwise(runs))
