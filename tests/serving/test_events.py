"""KV events: the state they describe, as vLLM writes them, and over a socket."""

import msgspec
import pytest
import zmq

import kvlab
from kvlab.__main__ import main
from kvlab.errors import ConfigError
from kvlab.serving import events
from kvlab.serving.events import MOST_MEDIA, KVEvents, watch
from kvlab.simulation.trace_files import load_traffic, save_traffic


def stored(blocks, parent=None, medium="GPU", **more):
    about = {"block_hashes": blocks, "parent_block_hash": parent, "token_ids": [7] * 16, "block_size": 16}
    return {"type": "BlockStored", **about, "lora_id": None, "medium": medium, **more}


def removed(blocks, medium="GPU"):
    return {"type": "BlockRemoved", "block_hashes": blocks, "medium": medium}


def batch(*events, when=1.0):
    return msgspec.msgpack.encode([when, list(events)])


@pytest.fixture
def state():
    return KVEvents()


def test_blocks_are_held_by_medium_until_they_leave_it(state):
    state.take(batch(stored([1, 2, 3]), stored([1, 2], medium="CPU"), removed([2, 3])))
    rows = {row["medium"]: row for row in state.rows()}
    assert rows["GPU"] == {"medium": "GPU", "held": 1, "stored": 3, "removed": 2}
    assert rows["CPU"] == {"medium": "CPU", "held": 2, "stored": 2, "removed": 0}
    state.take(batch({"type": "AllBlocksCleared"}))
    assert [row["held"] for row in state.rows()] == [0, 0]


def test_the_tree_has_a_branch_for_each_beginning(state):
    state.take(batch(stored([1, 2, 3]), stored([4, 5], parent=2), stored([8])))
    assert state.branches() == [{"blocks": 5, "longest": 4}, {"blocks": 1, "longest": 1}]
    assert "5 blocks, longest chain 4" in state._repr_html_()


def test_a_chain_of_any_length_is_followed(state):
    state.take(batch(stored(list(range(50_000)))))
    assert state.branches() == [{"blocks": 50_000, "longest": 50_000}]


def test_computed_prompts_are_traffic_that_shares_what_was_reused(state):
    state.take(batch(stored([1, 2, 3]), when=10.0))
    state.take(batch(stored([4], parent=3), when=11.0))  # more of the first: a piece, or its answer
    state.take(batch(stored([5, 6], parent=2), when=12.0))
    state.take(batch(stored([1], medium="CPU"), when=13.0))  # a copy to a tier is no prompt
    traffic = state.traffic()
    assert [len(request.block_ids) for request in traffic.requests] == [4, 4]
    assert traffic.arrivals_s.tolist() == [0.0, 2.0]
    run = kvlab.simulate(traffic, chunk_tokens=16)
    assert run.hit_blocks.tolist() == [0, 2]


def test_lost_batches_and_broken_ones_are_counted(state):
    for sequence in (4, 5, 9):
        state.take(batch(stored([sequence])), sequence)
    for wrong in (b"", b"\xff\xff", msgspec.msgpack.encode(7), batch({"type": "BlockStored"}), batch([]), batch(3)):
        state.take(wrong)
    state.take(batch({"type": "SomethingNew"}))
    assert (state.missed, state.broken) == (3, 6)
    assert state.rows()[0]["held"] == 3


def test_events_of_vllms_own_classes_are_read(state):
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, EventBatch

    about = {"token_ids": [1] * 32, "block_size": 16, "lora_id": None, "lora_name": None}
    first = BlockStored(block_hashes=[b"a", b"b"], parent_block_hash=None, medium="GPU", **about)
    events = [first, BlockRemoved(block_hashes=[b"b"], medium="GPU")]
    state.take(msgspec.msgpack.encode(EventBatch(ts=3.0, events=events)))
    assert (state.broken, state.block_tokens) == (0, 16)
    assert state.rows() == [{"medium": "GPU", "held": 1, "stored": 2, "removed": 1}]


def test_events_that_are_lists_are_read(state):
    state.take(batch(["BlockStored", [1, 2], None, [7] * 32, 16, None, "GPU"], ["BlockRemoved", [2], "GPU"]))
    assert state.rows() == [{"medium": "GPU", "held": 1, "stored": 2, "removed": 1}]


def test_nothing_seen_is_no_traffic(state):
    with pytest.raises(ConfigError, match="no prompt was seen: are KV events on"):
        state.traffic()


@pytest.fixture
def publisher():
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield socket, f"tcp://127.0.0.1:{port}"
    socket.close(linger=0)
    context.term()


def test_a_publisher_is_followed(publisher):
    socket, endpoint = publisher
    for number, state in enumerate(watch(endpoint, wait_s=0.02)):
        socket.send_multipart([b"", number.to_bytes(8, "big"), batch(stored([number]))])
        if sum(row["stored"] for row in state.rows()) >= 3:
            break
    assert state.broken == 0


def test_an_endpoint_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="'nonsense' is no endpoint, write tcp://host:port"):
        next(watch("nonsense"))


def test_the_command_writes_a_trace(monkeypatch, tmp_path, capsys):
    seen = KVEvents()
    seen.take(batch(stored([1, 2, 3])))
    monkeypatch.setattr("kvlab.cli.watch.watch", lambda *_, **__: iter([seen]))
    assert main(["watch", "--trace", str(tmp_path / "seen.jsonl"), "--json"]) == 0
    assert '"stored": 3' in capsys.readouterr().out
    assert load_traffic(tmp_path / "seen.jsonl", block_tokens=16).requests[0].num_tokens == 48


def test_the_command_says_where_nothing_came_from(monkeypatch, capsys):
    monkeypatch.setattr("kvlab.cli.watch.watch", lambda *_, **__: iter([KVEvents()]))
    assert main(["watch", "tcp://127.0.0.1:5999"]) == 0
    assert capsys.readouterr().out == "no events came from tcp://127.0.0.1:5999\n"


def hostile(**changes):
    return batch({**stored([8], 2), **changes})


@pytest.mark.parametrize(
    "payload",
    [
        batch(stored([1], 1)),
        batch(stored([5, 6], 6)),
        batch(stored([5], 2), stored([6], 7), stored([7], 6)),
        batch(stored([5, 5])),
        *(hostile(block_hashes=wrong) for wrong in ("abc", {"a": 1}, [[1]], [None], [True], [1.5], [b"x" * 65], None)),
        *(hostile(parent_block_hash=wrong) for wrong in ([1], "x", 1.5)),
        *(hostile(block_size=wrong) for wrong in (float("inf"), float("nan"), 0, -5, 2**63, "16", 1.5, None, True)),
        *(hostile(medium=wrong) for wrong in ([1], "x" * 65, 7)),
        *(batch(stored([8], 2), when=wrong) for wrong in (float("nan"), float("inf"), -1.0, 1e300, True, "1", None)),
        batch(removed([[1]])),
        b"\x91" * 100_000,
        b"\x92\x01" + b"\x91" * 5_000,
        msgspec.msgpack.encode([1, [5]]),
    ],
)
def test_a_hostile_batch_is_counted_and_changes_nothing(state, tmp_path, payload):
    """A chain of which every walk ends, and a trace that the simulator reads."""
    state.take(batch(stored([1, 2, 3])), 7)
    state.take(payload, 8)
    assert (state.broken, state.missed, state.left_out) == (1, 0, 0)
    state.take(batch(stored([9, 10], 2), when=2.0), 8)
    assert state.branches() == [{"blocks": 5, "longest": 4}]
    assert "5" in state._repr_html_()
    save_traffic(state.traffic(), tmp_path / "seen.jsonl")
    trace = load_traffic(tmp_path / "seen.jsonl", block_tokens=16)
    assert kvlab.simulate(trace, chunk_tokens=16).hit_blocks.tolist() == [0, 2]


def test_a_circle_that_closes_later_is_none(state):
    """Of blocks whose parent was stored before the watch began."""
    state.take(batch(stored([1, 2], 9)))
    state.take(batch(stored([8])))
    state.take(batch(stored([9], 2)))
    assert state.branches() == [{"blocks": 3, "longest": 3}, {"blocks": 1, "longest": 1}]
    assert [request.block_ids for request in state.traffic().requests] == [[0, 1, 3], [2]]
    state.take(batch(removed([1, 2, 8]), stored([9], 4), stored([1], 9)))
    assert (state.broken, state.branches()) == (0, [{"blocks": 2, "longest": 2}])


def test_tiers_that_name_no_parent_make_no_chain_of_blocks_of_other_prompts(state):
    state.take(batch(stored([5, 3], medium="CPU", block_size=0)))
    assert state.branches() == [{"blocks": 1, "longest": 1}] * 2
    state.take(batch(stored([3, 4, 5])))
    assert (state.broken, state.branches()) == (0, [{"blocks": 3, "longest": 3}])


def test_sequence_numbers_that_are_none_are_not_followed(state):
    state.take(batch(stored([1])), 0)
    state.take(batch(stored([2])), int.from_bytes(b"\xff" * 4000, "big"))
    assert (state.broken, state.missed) == (1, 0)
    assert "0 batches missed" in repr(state)


def test_a_clock_that_is_set_back_makes_a_trace_that_goes_on(state, tmp_path):
    for when, block in ((9.0, 1), (1.0, 2), (10.0, 3)):
        state.take(batch(stored([block]), when=when))
    save_traffic(state.traffic(), tmp_path / "seen.jsonl")
    assert load_traffic(tmp_path / "seen.jsonl", block_tokens=16).arrivals_s.tolist() == [0.0, 0.0, 1.0]


def test_blocks_of_another_size_are_held_and_in_no_trace(state):
    state.take(batch(stored([1, 2])))
    state.take(batch(stored([7], block_size=64), when=2.0))
    traffic = state.traffic()
    assert (traffic.block_tokens, state.left_out) == (16, 1)
    assert [(request.num_tokens, request.block_ids) for request in traffic.requests] == [(32, [0, 1])]
    assert state.rows()[0]["held"] == 3


NAME = "\x1b[2J\x1b[31mGPU\nfake line 7 blocks\x07<b>"


def test_a_name_from_the_network_is_shown_escaped_and_cut(state):
    state.take(batch(stored([1], medium=NAME), stored([2], medium="\u202eUPG")))
    assert state.broken == 0
    for shown in (repr(state), state._repr_html_()):
        assert shown.replace("\n", "x").isprintable()
        assert "\\x1b[2J\\x1b[31mGPU" in shown
        assert "fake line" not in shown
        assert "<b>" not in shown
    assert "\n" not in repr(state)
    assert state.rows()[0]["medium"] == NAME


def test_media_of_many_names_are_one_short_line(state):
    state.take(batch(*(stored([number], medium=f"{number}" * 15) for number in range(2000, 4000))))
    assert len(repr(state)) < 500
    assert len(state._repr_html_()) < 5_000
    rows = {row["medium"]: row["held"] for row in state.rows()}
    assert len(rows) == MOST_MEDIA + 1
    assert (sum(rows.values()), rows["others"]) == (2000, 2000 - MOST_MEDIA)
    state.take(batch(removed([3999], medium="3999" * 15)))
    assert {row["medium"]: row["held"] for row in state.rows()}["others"] == 1999 - MOST_MEDIA


class Counting(dict):
    """A dict that counts what is looked up."""

    num_lookups = 0

    def get(self, *key):
        self.num_lookups += 1
        return super().get(*key)


def test_a_batch_below_a_long_chain_costs_no_walk_along_it(state):
    """Also where its blocks have children already."""
    state.take(batch(stored(list(range(5_000)))))
    state.take(batch(stored([6_000 + at for at in range(50)], 7_000)))
    state._parents = Counting(state._parents)
    state.take(batch(stored([7_000], 4_999), stored([8_000], 4_999)))
    assert state.broken == 0
    assert state._parents.num_lookups < 20
    assert len(state.traffic().requests[-1].block_ids) == 5_001
    for number in range(9_000, 9_100):  # one prompt, a block a batch
        state.take(batch(stored([number], number - 1 if number > 9_000 else 4_999)))
    assert len(state.traffic().requests[-1].block_ids) == 5_100
    assert state._parents.num_lookups < 1_000


def test_beyond_a_bound_the_oldest_blocks_are_forgotten(state, monkeypatch, capsys):
    monkeypatch.setattr(events, "MOST_HELD", 10)
    monkeypatch.setattr(events, "MOST_NAMED", 30)
    for number in range(40):
        state.take(batch(stored([number], number - 1 if number else None), stored([number], medium="CPU")))
    assert {row["medium"]: (row["held"], row["stored"]) for row in state.rows()} == {"GPU": (10, 40), "CPU": (10, 40)}
    assert (state.forgotten, state.left_out) == (30, 10)
    assert "GPU 10, 30 forgotten; 1 prompts" in repr(state)
    assert state.branches() == [{"blocks": 10, "longest": 10}]
    assert len(state._parents) == len(state._children) == 10
    assert [request.block_ids for request in state.traffic().requests] == [list(range(30))]
    state.take(batch(removed([0, 39])))
    assert state.rows()[1]["held"] == 9
    monkeypatch.setattr("kvlab.cli.watch.watch", lambda *_, **__: iter([state, state]))
    assert main(["watch", "--json"]) == 0
    assert capsys.readouterr().err.count("from now on the oldest are forgotten") == 1
