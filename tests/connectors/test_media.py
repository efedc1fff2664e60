"""Images and the like are named by content, whatever vLLM or a client calls them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvlab.connectors.vllm.scheduler.media import MediaNames

PIXELS = torch.arange(48, dtype=torch.float32).reshape(1, 3, 4, 4)


def feature(identifier, **fields):
    data = {name: SimpleNamespace(data=value) for name, value in fields.items()} or None
    return SimpleNamespace(identifier=identifier, data=data)


def name(names, request_id, identifier, **fields):
    found = names.names([feature(identifier, **fields)], request_id)
    return found and found[0]


def test_an_identifier_that_a_process_counts_names_nothing_in_another():
    """vLLM's own, where both of its caches are off."""
    counted = "renderer0-mm-1-image-0"
    one = name(MediaNames(), "a", counted, pixel_values=PIXELS)
    other = name(MediaNames(), "a", counted, pixel_values=PIXELS + 1)
    assert None not in (one, other)
    assert one != other
    assert one == name(MediaNames(), "b", counted, pixel_values=PIXELS.clone())


def test_what_came_under_a_used_uuid_is_not_cached():
    """The engine's encoder output is that of the first input."""
    names = MediaNames()
    first = name(names, "a", "logo", pixel_values=PIXELS)
    assert first == name(names, "b", "logo", pixel_values=PIXELS)
    assert name(names, "c", "logo", pixel_values=PIXELS + 1) is None
    assert name(names, "d", "logo", pixel_values=PIXELS) is None, "which output the encoder holds by now is not known"
    assert names.take_spoilt() == {"a", "b"}, "what these compute from now on may come of the other input"
    assert names.take_spoilt() == set()
    assert name(names, "a", "logo") is None
    names.forget("a")
    assert name(names, "a", "logo", pixel_values=PIXELS) is None
    assert name(names, "e", "other", pixel_values=PIXELS) != first


def test_one_input_without_a_name_is_enough():
    names = MediaNames()
    features = [feature("a", pixel_values=PIXELS), feature("b")]
    assert names.names(features, "r") is None
    assert names.names([feature(None, pixel_values=PIXELS)], "s") is None
    assert names.names([feature("c", address=7, monotonic_id=1, signature=[1])], "t") is None, "it is in shared memory"
    assert names.names([feature("d", what=object())], "u") is None
    assert names.names([], "v") == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PIXELS, PIXELS.reshape(1, 4, 3, 4)),
        (PIXELS, PIXELS.view(torch.int32)),
        (PIXELS, PIXELS.numpy()),
        (PIXELS, [PIXELS]),
        (PIXELS.bfloat16(), PIXELS.half()),
        ([PIXELS, PIXELS], [PIXELS, PIXELS, PIXELS]),
        ([[1, 2], 3], [[1], 2, 3]),
        ([1, 23], [12, 3]),
        (1, 1.0),
        (1, True),
        ("1", 1),
        (b"1", "1"),
        (np.arange(3), np.arange(3, dtype=np.int32)),
        (torch.tensor(1), torch.tensor([1])),
    ],
)
def test_values_that_differ_have_names_that_differ(one, other):
    found = [name(MediaNames(), "r", "i", field=value) for value in (one, other)]
    assert None not in found
    assert found[0] != found[1]


def test_names_follow_from_all_fields_in_any_order():
    grid = torch.tensor([[1, 4, 4]])
    one = name(MediaNames(), "r", "i", pixel_values=PIXELS, grid=grid)
    assert one == name(MediaNames(), "r", "i", grid=grid, pixel_values=PIXELS.transpose(2, 3).transpose(2, 3))
    assert one != name(MediaNames(), "r", "i", pixel_values=PIXELS, grid=grid + 1)
    assert one != name(MediaNames(), "r", "i", pixel_values=PIXELS, grids=grid)
    assert one != name(MediaNames(), "r", "i", pixel_values=PIXELS)


def test_identifiers_take_bounded_memory():
    names = MediaNames(kept=100)
    for number in range(110):
        name(names, str(number), str(number), field=1)
        names.forget(str(number))
    assert len(names._digests) == 100
    assert not names._requests
    assert not names._users


def test_identifiers_in_use_are_not_forgotten():
    """The encoder still holds the output of the first input under them."""
    names = MediaNames(kept=10)
    assert name(names, "lives", "held", field=1)
    for number in range(100):
        assert name(names, str(number), "logo", field=1), "used by every request"
        name(names, str(number), str(number), field=1)
        names.forget(str(number))
    assert name(names, "a", "held", field=2) is None
    assert name(names, "b", "logo", field=2) is None
    assert names.take_spoilt() == {"lives"}
