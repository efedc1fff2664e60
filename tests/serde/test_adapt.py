"""Level choice by deadline, against numbers worked out by hand."""

import pytest

from kvlab.errors import ConfigError
from kvlab.serde.adapt import RECOMPUTE, Choice, choose_level, stream

SIZES = [{"lossless": 700, "int8": 500, "cachegen": 200}] * 4


def test_best_level_that_arrives_in_time() -> None:
    assert choose_level(SIZES, 30.0, 100.0, None) == "lossless"
    assert choose_level(SIZES, 20.0, 100.0, None) == "int8"
    assert choose_level(SIZES, 19.9, 100.0, None) == "cachegen"


def test_smallest_where_nothing_arrives_in_time() -> None:
    assert choose_level(SIZES, 0.1, 100.0, None) == "cachegen"


def test_recompute_goes_before_any_level_when_it_fits() -> None:
    assert choose_level(SIZES, 10.0, 100.0, 9.0) == RECOMPUTE
    assert choose_level(SIZES, 8.0, 100.0, 9.0) == "cachegen"


def test_a_drop_of_bandwidth_is_answered_one_chunk_later() -> None:
    choices = stream(SIZES, [(0.0, 100.0), (7.0, 20.0)], deadline_s=28.0)
    assert choices[0] == Choice("lossless", 7.0)
    assert choices[1] == Choice("lossless", 42.0)  # believed 100 B/s, saw 20
    assert [choice.level for choice in choices[2:]] == ["cachegen", "cachegen"]


def test_a_chunk_across_a_change_takes_both_rates() -> None:
    assert stream(SIZES[:1], [(0.0, 100.0), (5.0, 50.0)], 100.0) == [Choice("lossless", 9.0)]


@pytest.mark.parametrize("trace", [[], [(1.0, 5.0)], [(0.0, 0.0)]])
def test_a_trace_that_cannot_be_is_refused(trace: list[tuple[float, float]]) -> None:
    with pytest.raises(ConfigError):
        stream(SIZES, trace, 1.0)
