"""Objects in a cache server's memory that engines read where they lie: never other bytes, and never for good."""

import contextlib
import mmap
import os

import numpy as np
import pytest

from kvlab.errors import ConfigError
from kvlab.hashing import Namespace
from kvlab.sharedmemory import LendingMemory, LentMemory
from kvlab.stores import open_store
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.host import CacheServer
from kvlab.tierworker.link import LinkError
from kvlab.tierworker.messages import Fill, Opening
from tests.support.served import Attached, opened
from tests.tierworker.test_process import LAYERS, PAGE, until

KEY = Namespace("m", {"rank": 0}).key(bytes.fromhex("aa" * 16))
OBJECT = 4 * LAYERS * PAGE


class Reader(Attached):
    """An engine that asks where objects lie, and reads them there."""

    def borrow(self, name, slots=range(4)):
        """The request's number, and the object's bytes in the server's memory; None where it was not lent."""
        number, told = self.client.next_id(), []
        self.client.fill(Fill(number, *self._place(name, slots), lend=True), lambda message, _: told.append(message))
        until(lambda: told, self.client.poll)
        at = told[0] and told[0].get("at")
        if at is None:
            return number, told[0] and told[0]["tier"], None
        held = self.client.lent.bytes[at : at + OBJECT].reshape(4, LAYERS * PAGE)
        return number, told[0]["tier"], held


@pytest.fixture
def reader(server):
    reader = Reader(server.path)
    reader.write("aa", range(4))
    assert reader.wait("aa") == [True]
    yield reader
    reader.client.close()


def lent_bytes(server):
    return server._lender.lent_bytes


def fill_memory(server):
    """Put other things until all that can be evicted is gone."""
    for number in range(40):
        server.store.put(f"other{number}", bytes([number]) * (2 << 20))


def test_it_is_read_where_it_lies(server, reader):
    reader.shared.slots[:] = 7
    _, tier, held = reader.borrow("aa")
    assert tier == "memory"
    assert np.array_equal(held, reader.bytes[:4])
    assert (reader.shared.slots == 7).all(), "nothing was copied"
    assert not held.flags.writeable


def test_it_stays_until_it_is_given_back(server, reader):
    number, _, held = reader.borrow("aa")
    fill_memory(server)
    assert np.array_equal(held, reader.bytes[:4])
    assert reader.client.has_kept(reader.client.session)
    reader.client.give_back(reader.client.session, [number])
    until(lambda: lent_bytes(server) == 0)
    fill_memory(server)
    assert server.store.why_missing(KEY) == "evicted"


def test_what_is_replaced_stays_for_those_who_read_it(server, reader):
    _, _, held = reader.borrow("aa")
    server.store.put(KEY, b"x" * OBJECT)
    server.store.delete(KEY)
    fill_memory(server)
    assert np.array_equal(held, reader.bytes[:4])


def test_an_engine_that_dies_gives_back_what_it_had(server):
    reader = Reader(server.path)
    reader.write("aa", range(4))
    reader.wait("aa")
    reader.borrow("aa")
    assert lent_bytes(server) > 0
    reader.client._worker.link.close()  # as when its process is killed
    until(lambda: lent_bytes(server) == 0)
    fill_memory(server)
    assert server.store.why_missing(KEY) == "evicted"


def test_the_socket_ends_before_the_loans_do(server, reader, monkeypatch):
    """An engine looks at the socket when its copy has ended: that is only right in this order."""
    from kvlab.tierworker import loans

    seen, ended = [], loans.Loans.close
    session = next(iter(server._sessions.values()))[0]

    def close(self):
        seen.append(session.link.socket.fileno())
        ended(self)

    monkeypatch.setattr(loans.Loans, "close", close)
    session.leave()
    until(lambda: seen)
    assert seen == [-1]
    assert not reader.client.has_kept(reader.client.session)


def test_an_end_is_seen_behind_messages_that_were_not_read(server, reader):
    client, session = reader.client, next(iter(server._sessions.values()))[0]
    kept = client.session
    for _ in range(100):
        session.link.send({"op": "tiers", "rows": []}, bytes(1000))
    assert client.has_kept(kept)
    session.leave()
    until(lambda: not client.has_kept(kept))


def test_no_engine_can_write_to_it(server, reader):
    with pytest.raises(ValueError, match="read-only"):
        reader.client.lent.bytes[0] = 1
    fd = server.store.fd
    for write in (
        lambda: mmap.mmap(fd, PAGE),
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.posix_fallocate(fd, 0, server.store.lent_bytes + PAGE),
    ):
        with pytest.raises(OSError, match=r"not permitted"):
            write()
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with contextlib.closing(os.fdopen(other)), pytest.raises(OSError, match="not permitted"):
        mmap.mmap(other, PAGE)


def test_broken_bytes_are_not_lent(server, reader):
    """Another client of the server may have put them there."""
    value = bytearray(server.store.get(KEY))
    value[-1] ^= 1
    server.store.put(KEY, bytes(value))
    assert reader.borrow("aa")[1:] == ("", None)
    server.store.put(KEY, b"short")
    assert reader.borrow("aa")[1:] == ("", None)


def test_an_object_of_another_shape_or_other_tokens_is_not_lent(server, reader):
    assert reader.borrow("aa", range(8))[1:] == ("", None)
    told = []
    place = (0, "", "aa" * 16, ((0, 4),), 0, 48)
    reader.client.fill(Fill(reader.client.next_id(), *place, lend=True), lambda message, _: told.append(message))
    until(lambda: told, reader.client.poll)
    assert told[0]["tier"] == ""
    assert reader.borrow("aa")[2] is not None, "it stays where it is"


def test_a_reader_with_a_key_is_not_lent_what_carries_no_mac(server, reader, tmp_path):
    assert reader.borrow("aa")[2] is not None  # the checksum was found right
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    other = Reader.__new__(Reader)
    opening = Opening([], "naive", str(key), [{"model": "m", "fields": {"rank": 0}}])
    other._share(TierClient(opening, path=str(server.path)), seed=2)
    assert other.borrow("aa")[1:] == ("", None)
    other.client.close()


def test_where_too_much_is_lent_it_is_copied(server, reader):
    server._lender.most_bytes = OBJECT
    reader.shared.slots[:] = 7
    assert reader.borrow("aa", range(8, 12))[1:] == ("memory", None)
    assert np.array_equal(reader.shared.slots[8:12], reader.bytes[:4])


def test_other_engines_read_the_same_object(server, reader):
    others = [Reader(server.path) for _ in range(3)]
    for other in others:
        assert np.array_equal(other.borrow("aa")[2], reader.bytes[:4])
    for other in others:
        other.client.close()
    until(lambda: lent_bytes(server) == 0)


@pytest.mark.parametrize("ids", [None, "1", [1.5], ["1"], [True], {}, [0] * 100_000])
def test_what_is_no_list_of_loans_ends_the_session(server, reader, ids):
    link = opened(server)
    link.receive()
    link.send({"op": "give_back", "ids": ids})
    until(lambda: not link.is_up)
    link.close()
    assert reader.borrow("aa")[2] is not None


def test_loans_of_others_cannot_be_given_back(server, reader):
    number, _, held = reader.borrow("aa")
    link = opened(server)
    link.receive()
    link.send({"op": "give_back", "ids": list(range(-3, number + 100))})
    link.send({"op": "over", "token": "x"})
    until(lambda: link.wait(0.1))
    fill_memory(server)
    assert np.array_equal(held, reader.bytes[:4])
    link.close()


def test_memory_below_a_stack_and_memory_of_its_own_are_not_lent(tmp_path):
    for store, lends in (
        (open_store("memory://?size=4MiB&pinned=false"), False),
        (TieredStore([MemoryStore(4 << 20, pinned=False, lending=True), open_store(f"file://{tmp_path}/kv")]), True),
        (TieredStore([open_store(f"file://{tmp_path}/of"), MemoryStore(4 << 20, pinned=False, lending=True)]), False),
    ):
        path = tmp_path / f"{lends}{store.name}{len(os.listdir(tmp_path))}.sock"
        server = CacheServer(store, path)
        assert (server._lender.fd >= 0) is lends
        server.leave_place()
        store.close()


def test_a_tier_that_has_missed_a_newer_write_lends_nothing(tmp_path):
    memory = MemoryStore(4 << 20, pinned=False, lending=True)
    store = TieredStore([memory, open_store(f"file://{tmp_path}/kv")])
    store.put("k", b"old")
    store.tiers[0].miss("k")
    from kvlab.tierworker.loans import Lender

    assert Lender(store).lend("k") is None
    store.close()


def test_memory_that_can_be_cut_short_is_not_mapped():
    fd = os.memfd_create("x")
    os.ftruncate(fd, PAGE)
    with pytest.raises(ConfigError, match="lent memory must hold"):
        LentMemory(fd, PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)  # it was taken over
    memory = LendingMemory(PAGE)
    with pytest.raises(ConfigError, match="lent memory must hold"):
        LentMemory(os.dup(memory.fd), 2 * PAGE)


def test_a_forked_child_has_memory_of_its_own():
    with MemoryStore(1 << 20, pinned=False, lending=True) as store:
        store.put("k", b"parent")
        pid = os.fork()
        if pid == 0:
            is_right = store.get("k") is None and store.put("k", b"child!") and bytes(store.get("k")) == b"child!"
            os._exit(0 if is_right else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert bytes(store.get("k")) == b"parent"


def test_a_session_that_keeps_what_it_was_lent_is_ended(server, reader, monkeypatch):
    """Objects that stay where they are leave no room between them."""
    from kvlab.tierworker import loans

    reader.borrow("aa")
    session = reader.client.session
    monkeypatch.setattr(loans, "LOAN_S", -1.0)
    until(lambda: not reader.client.has_kept(session))
    until(lambda: lent_bytes(server) == 0)
    fill_memory(server)
    assert server.store.why_missing(KEY) == "evicted"


def test_an_object_counts_once_however_many_have_it(server, reader, monkeypatch):
    from kvlab.tierworker import loans

    numbers = [reader.borrow("aa")[0] for _ in range(20)]
    assert lent_bytes(server) < 2 * OBJECT
    assert server._lender.num_loans == 20
    monkeypatch.setattr(loans, "MOST_LOANS", 20)
    assert reader.borrow("aa", range(8, 12))[1:] == ("memory", None), "a loan more would be too many"
    reader.client.give_back(reader.client.session, numbers)
    until(lambda: server._lender.num_loans == 0)
    assert lent_bytes(server) == 0


def test_what_is_not_there_is_one_miss(server, reader):
    before = server.store.counters.misses
    assert reader.borrow("bb")[1:] == ("", None)
    assert server.store.counters.misses == before + 1


def test_a_link_that_is_closed_sends_nothing_more(server):
    """Its descriptor's number may be another's by then."""
    link = opened(server)
    other = opened(server)
    link.close()
    with pytest.raises(LinkError, match="the link is closed"):
        link.send({"op": "x"})
    assert not link.is_up
    assert other.is_up
    other.close()


@pytest.mark.parametrize("at", [True, False, -1, 1 << 60, 0.5, "0", None])
def test_a_place_that_is_none_is_a_miss_to_an_engine(at):
    from types import SimpleNamespace

    from kvlab.connectors.vllm.worker.lent import Lent

    arena = np.zeros((4, PAGE), np.uint8)
    tiers = SimpleNamespace(lent=SimpleNamespace(bytes=np.zeros(8 * PAGE, np.uint8)), session=1)
    transfer = SimpleNamespace(arena=arena, map_lent=lambda memory: True)
    lent = Lent(tiers, transfer, is_wanted=True)
    op, fill = SimpleNamespace(slots=(0, 1), generation=1), SimpleNamespace(lend=True, id=1)
    assert lent.take(op, fill, at) is False
    assert lent.take(op, fill, 6 * PAGE) is True
    assert lent.take(op, fill, 6 * PAGE + 1) is False
    fill.lend = False
    assert lent.take(op, fill, 0) is False


def test_memory_of_less_than_a_page_is_one_line(capsys):
    from kvlab.__main__ import main

    assert main(["serve", "--memory", "4095", "--listen", "/nowhere/x.sock"]) == 2
    assert "--memory must be at least 4096 bytes, got '4095'" in capsys.readouterr().err
