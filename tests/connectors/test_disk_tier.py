"""A disk tier under a real engine: restarts, other models' files, damage, full disks, budgets."""

import os

import pytest

from kvlab.connectors.vllm.messages import WorkerReport
from kvlab.hashing import block_hashes
from tests.connectors.damage import cut_short, flip_a_bit, make_a_folder, make_empty, objects, swap_content
from tests.connectors.engine import BLOCK, connector, drain, engine, generate, prompt, shared, worker
from tests.connectors.models import TOKEN_BYTES


def test_a_new_engine_finds_what_an_old_one_stored(tmp_path, expected):
    """In another process too: see `test_two_processes_share_one_redis_and_one_folder`."""
    with engine([f"file://{tmp_path}?size=1GiB"]) as llm:
        generate(llm, [prompt(300)])
    assert objects(tmp_path)
    with engine([f"file://{tmp_path}?size=1GiB"]) as llm:
        answer = generate(llm, [prompt(300)])[0]
        assert answer.hit == 299
        assert answer.row["tier"] == "disk"
        assert answer.tokens == expected(prompt(300))
    others = [({"dtype": "bfloat16"}, {}), ({"block_size": 64}, {}), ({}, {"namespace": "other"})]
    for settings, extra in others:
        with engine([f"file://{tmp_path}?size=1GiB"], settings, **extra) as llm:
            assert generate(llm, [prompt(300)])[0].hit == 0
            assert not connector(llm).hook_errors


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return tmp_path_factory.mktemp("tier")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, swap_content, make_empty, make_a_folder])
def test_damage_is_a_miss(disk, expected, damage):
    folder, llm = disk, shared(f"file://{disk}?size=1GiB")
    p = prompt(300)
    generate(llm, [p])
    drain(llm)
    files = objects(folder)
    damage(files[0], files)
    damaged = generate(llm, [p])[0]
    assert damaged.tokens == expected(p)
    assert damaged.hit < 299
    drain(llm)
    assert generate(llm, [p])[0].tokens == expected(p)
    counters = connector(llm).scheduler.counters
    assert counters["bad_objects"] >= 1 or counters["miss_never_stored"] >= 1


def test_what_the_tier_holds_is_not_copied_to_it_again(disk, expected, monkeypatch):
    llm = shared(f"file://{disk}?size=1GiB")
    scheduler, p = connector(llm).scheduler, prompt(300, ending=1)
    generate(llm, [prompt(300)])
    drain(llm)
    others = objects(disk)
    generate(llm, [p])
    drain(llm)
    before = scheduler.counters["saved_tokens"]
    assert generate(llm, [p])[0].hit == 299
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_is_worth", lambda *_: False)
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens, answer.row["miss"]) == (0, expected(p), "not_worth_loading")
    assert scheduler.counters["saved_tokens"] == before
    for path in set(objects(disk)) - set(others):
        cut_short(path, [])
    for hit in (256, 299):  # what was lost is computed, saved again and found
        assert generate(llm, [p])[0].hit == hit
        drain(llm)
    assert scheduler.counters["saved_tokens"] == before + 300 - 256


def test_what_was_found_broken_and_is_there_again_is_served(disk, expected):
    """Another engine may have replaced the copy."""
    llm = shared(f"file://{disk}?size=1GiB")
    scheduler, p = connector(llm).scheduler, prompt(300)
    generate(llm, [p])
    drain(llm)
    assert generate(llm, [p])[0].hit == 299
    scheduler.absorb(WorkerReport(absent=set(block_hashes(p, BLOCK))))
    for hit in (0, 299):
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens) == (hit, expected(p))
        drain(llm)


def test_an_unwritable_folder_costs_misses_never_a_request(tmp_path, expected, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    p = prompt(480, ending=0)
    with engine([f"file://{tmp_path}?size=1GiB"], in_thread=True) as llm:
        with monkeypatch.context() as patch:
            for name in ("write", "pwrite", "writev", "pwritev"):
                patch.setattr(os, name, full)
            assert generate(llm, [p])[0].tokens == expected(p)
            drain(llm)
            residency, key = connector(llm).scheduler.residency, block_hashes(p, BLOCK)[-1]
            assert not residency.is_written(key), "nothing was taken"
            assert generate(llm, [p])[0].tokens == expected(p)
            drain(llm)
        assert generate(llm, [p])[0].hit < 479
        drain(llm)
        assert residency.is_written(key)
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens) == (479, expected(p))


def test_budgets_hold_with_files_from_before(tmp_path, expected):
    budget = 450 * TOKEN_BYTES
    (tmp_path / "old").mkdir()
    with engine([f"memory://?size={budget}", f"file://{tmp_path}?size={budget}"]) as llm:
        for p in [prompt(480), prompt(480, ending=0), prompt(300, ending=1), prompt(480)]:
            assert generate(llm, [p])[0].tokens == expected(p)
            drain(llm)
            assert sum(path.stat().st_size for path in objects(tmp_path)) <= budget
        assert worker(llm).transfer.arena.numel() <= budget
    less = 180 * TOKEN_BYTES
    with engine([f"file://{tmp_path}?size={less}"]) as llm:
        generate(llm, [prompt(300)])
        drain(llm)
        assert sum(path.stat().st_size for path in objects(tmp_path)) <= less


def test_lossless_serde_gives_the_same_tokens(tmp_path, expected):
    with engine([f"file://{tmp_path}?size=1GiB&serde=lossless"]) as llm:
        p = prompt(300)
        generate(llm, [p])
        drain(llm)
        again = generate(llm, [p])[0]
        assert again.hit == 299
        assert again.tokens == expected(p)
