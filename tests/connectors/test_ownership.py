"""Slots named by an operation that has not ended are nobody else's, whatever fails meanwhile."""

import threading

from kvlab.connectors.vllm.namespace import rank_namespace
from kvlab.hashing import block_hashes
from kvlab.stores.wrappers import WrapperStore
from tests.connectors.damage import flip_a_bit, objects
from tests.connectors.engine import BLOCK, connector, drain, engine, generate, objects_of, prompt, text_ids, worker
from tests.connectors.models import TOKEN_BYTES

CHUNK = 2 * BLOCK
SLOT_BYTES = TOKEN_BYTES * BLOCK


class Gate(WrapperStore):
    """A tier that takes nothing until it is let to."""

    opened = threading.Event()

    def put(self, key, value):
        assert self.opened.wait(200)
        return super().put(key, value)


def test_a_broken_object_that_others_still_need_keeps_its_slots(tmp_path):
    """One bit on a disk rots, and the disk is slow: the broken object's fresh copy waits to be written while a load
    that uses it ends, and other objects come for its slots."""
    short, long = prompt(2 * CHUNK + 1), prompt(3 * CHUNK + 1)
    others = [list(text_ids()[500 + 20 * at : 500 + 20 * at + CHUNK + 1]) for at in range(7)]
    disk = f"file://{tmp_path}?size=2GiB"
    options = {"save_partial_block": False}
    with engine(["memory://?size=256MiB", disk], **options) as llm:
        want = generate(llm, [long])[0].tokens
        drain(llm)
        second = rank_namespace(connector(llm).namespace, 0).key(block_hashes(long, BLOCK)[3])
    (rotten,) = [path for path in objects(tmp_path) if second.rpartition(":")[2] in path.name]
    flip_a_bit(rotten, [])
    with engine([f"memory://?size={12 * SLOT_BYTES}", disk], in_thread=True, **options) as llm:
        scheduler, tier = connector(llm).scheduler, objects_of(llm)
        tier.store = gate = Gate(tier.store)
        generate(llm, [others[0]], max_tokens=1)  # its write is the one that waits at the gate
        generate(llm, [short], max_tokens=1)  # finds the second object broken, computes it, saves it
        assert generate(llm, [long], max_tokens=1)[0].hit == 3 * CHUNK
        assert len(scheduler.saves.in_flight) >= 2, "the fresh copy is not written yet"
        for other in others[1:]:
            generate(llm, [other], max_tokens=1)
        gate.opened.set()
        drain(llm)
        assert not scheduler.index.num_leased_slots
        assert not worker(llm).counters["slot_mismatch"]
    with engine(["memory://?size=256MiB", disk], **options) as llm:
        answer = generate(llm, [long])[0]
        assert (answer.hit, answer.tokens) == (3 * CHUNK, want)
