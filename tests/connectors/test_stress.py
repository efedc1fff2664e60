"""A few rounds of random traffic over faulty tiers. More by hand: `python -m tests.connectors.stress SEED ROUNDS`."""

import pytest

from tests.connectors.stress import Stress


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "seed"), [("llama", 8), ("gemma", 1), ("lora", 2)])
def test_random_traffic_over_faulty_tiers(tmp_path, kind, seed):
    stress = Stress(tmp_path, seed, kind)
    for number in range(2):
        stress.round(number)
    assert stress.wrong == []
    assert stress.totals["finished"] > 200
    # How many depends on the machine: settings are drawn in which a slow answer of a tier is a miss.
    assert stress.totals["hits"] + stress.totals["persisted hits"] > 0
    assert stress.totals["aborted"] > 2
