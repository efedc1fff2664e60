"""What a cluster says of its slots: as many as there are, and no more work than that."""

import random

import pytest
from liars import Liar
from lying import URLS, recovers

from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.redis import topology
from kvlab.stores.redis.topology import key_slot
from kvlab.stores.redis.url import PASSWORD
from kvlab.stores.wire import ProtocolError


@pytest.fixture(autouse=True)
def no_password(monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)


def slots(*ranges):
    here = b"*2\r\n$9\r\n127.0.0.1\r\n:1\r\n"
    return b"*%d\r\n" % len(ranges) + b"".join(b"*3\r\n:%d\r\n:%d\r\n" % place + here for place in ranges)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 16383)] * 20_000,
        [(0, 16383)] * 3_000,
        [(slot % 16384, slot % 16384) for slot in range(20_000)],
        [(0, 16383), (5, 5)],
    ],
    ids=["20,000 whole ones", "3,000 whole ones", "20,000 of one slot", "one in another"],
)
def test_more_slots_than_there_are_is_a_lie(ranges):
    """16,384 slots have one owner each; so what a topology costs to take in is bounded."""
    reply = [[low, high, [memoryview(b"h"), 1]] for low, high in ranges]
    with pytest.raises(ProtocolError, match="slots"):
        topology._ranges(reply, "h")
    with Liar({b"CLUSTER": slots(*ranges)}) as liar, open_store(URLS["cluster"].format(liar.port)) as store:
        with pytest.raises(StoreError) as caught:
            store.get("kvlab:a")
        assert caught.value.reason in ("unreachable", "timeout")
        liar.lies = {}
        recovers(store)


def test_slots_that_all_lie_apart_are_a_cluster():
    reply = [[slot, slot, [memoryview(b"h"), 1 + slot % 3]] for slot in range(16384)]
    assert len(topology._ranges(reply, "h")) == 16384


def test_slots_are_those_of_redis():
    from redis.crc import key_slot as theirs

    draw = random.Random(2)
    for key in [b"", b"{}", b"a{}b{c}", b"{a", b"a}{b}", b"{{a}}", *(draw.randbytes(9) + b"{x}" for _ in range(200))]:
        assert key_slot(key) == theirs(key)
