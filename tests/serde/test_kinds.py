"""The conformance suite over every kind."""

import pytest

from kvlab.serde import Serde
from kvlab.testing.serde import SerdeTests
from tests.serde.kinds import MAX_ERROR, SPECS, serde_of


@pytest.fixture(scope="class", params=SPECS)
def serde(request: pytest.FixtureRequest) -> Serde:
    made = serde_of(request.param)
    TestKinds.max_error = MAX_ERROR.get(made.name, 0.0)
    TestKinds.of_one_model = made.name == "cachegen"
    return made


class TestKinds(SerdeTests):
    """One class, all kinds: what differs is the error each may make. tests/fuzz breaks many more of their objects."""

    mutations = 3_000
