"""What clients hold on the way: never more than there is, and none waits for another for ever."""

import threading

from kvlab.stores import open_store
from kvlab.tierworker.budget import LEAST_BYTES, Budget, Hold, Share
from tests.tierworker.test_process import until


def test_a_budget_is_twice_the_tiers():
    with open_store("memory://?size=200MiB&pinned=false") as store:
        budget = Budget(store)
        assert budget.max_bytes == LEAST_BYTES
        budget.ask()
        assert budget.max_bytes == 400 << 20


def test_who_comes_first_is_served_first_and_too_much_is_refused():
    budget = Budget(None, 100)
    first, large, small = (Hold(budget) for _ in range(3))
    assert first.take(60, 0.0)
    assert not large.take(101, 60.0)
    assert not small.take(50, 0.0)
    order = []
    threads = []
    for name, hold, size in (("large", large, 90), ("small", small, 10)):
        threads.append(threading.Thread(target=lambda n=name, h=hold, s=size: h.take(s, 60.0) and order.append(n)))
        threads[-1].start()
        until(lambda hold=hold: hold in budget._waiting)
    assert budget.is_wanted
    first.give_back()
    for thread in threads:
        thread.join(60)
    assert order == ["large", "small"]
    assert not budget.is_wanted


def test_those_who_hold_a_part_do_not_wait_for_each_other():
    """Four need 80 of 100 and hold 20 each: the first goes over, ends, and the next one does."""
    budget = Budget(None, 100)
    done = []

    def arrive(hold):
        while hold.num_bytes < 80:
            assert hold.take(20, 60.0)
        done.append(hold)
        hold.give_back()

    holds = [Hold(budget) for _ in range(4)]
    for hold in holds:
        assert hold.take(20, 0.0)
    threads = [threading.Thread(target=arrive, args=(hold,)) for hold in holds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4
    assert budget._held == 0


def test_who_gives_up_waits_no_more():
    budget = Budget(None, 100)
    assert Hold(budget).take(100, 0.0)
    assert not Hold(budget).take(1, 1000.0, gives_up=lambda: True)


def test_a_share_is_taken_at_once_or_not_at_all():
    share = Share(10)
    assert share.take(6)
    assert not share.take(5)
    share.give_back(6)
    assert share.take(10)
