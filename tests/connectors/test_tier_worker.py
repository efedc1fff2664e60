"""A real engine whose tier worker is killed, a real engine that is killed itself, and engines that share a server."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from kvlab.stores import open_store
from tests.connectors.damage import objects
from tests.connectors.engine import connector, drain, empty_memory, engine, generate, prompt, worker
from tests.support.tiers import cache_server

ROOT = Path(__file__).parents[2]


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_tier_worker_that_is_killed_costs_misses_never_a_request(tmp_path, expected):
    p, q = prompt(300), prompt(480)
    with engine(["memory://?size=64MiB", f"file://{tmp_path}?size=1GiB"]) as llm:
        tiers, scheduler = worker(llm).tiers, connector(llm).scheduler
        tiers._wait_s = 0.01
        generate(llm, [p])
        drain(llm)
        hits = 0
        for at in range(12):
            tiers._wait_s = 0.01
            empty_memory(llm)
            # Before the question, at a random moment of the load, or with the saves of q under way.
            killer = threading.Timer(at % 6 * 0.01, tiers._worker.kill)
            killer.start()
            answers = generate(llm, [p, q] if at % 2 else [p])
            killer.join()
            assert [answer.tokens for answer in answers] == [expected(each) for each in ([p, q] if at % 2 else [p])]
            until(lambda: tiers.poll() or tiers._is_open)
            drain(llm)
            empty_memory(llm)
            again = generate(llm, [p])[0]
            assert again.tokens == expected(p)
            hits += again.hit > 0
            drain(llm)
        assert hits >= 6, "it is served again by the next one"
        assert scheduler.counters["tier_worker_restarts"] >= 12
        generate(llm, [prompt(31)], max_tokens=1)  # reports come with steps
        drain(llm)  # and its own save
        assert not scheduler.index.num_leased_slots
        assert (scheduler.loads.in_flight, scheduler.saves.in_flight) == ({}, {})
        assert not connector(llm).hook_errors


KILLED = """
    import os, signal, sys
    from tests.connectors.engine import engine, generate, prompt, worker
    with engine({tiers!r}) as llm:
        print("ready", getattr(worker(llm).tiers._worker, "process", None) and worker(llm).tiers._worker.process.pid)
        sys.stdout.flush()
        for at in range(50):
            generate(llm, [prompt(700)[at:], prompt(480)[at:]], max_tokens=1)
            if at == 3:
                os.kill(os.getpid(), signal.SIGKILL)  # saves are under way
"""


def killed_engine(tiers):
    """Run an engine that is killed in the middle of its saves; the pid of its tier worker, if it had one."""
    code = textwrap.dedent(KILLED.format(tiers=tiers))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, cwd=ROOT, env=dict(os.environ))
    assert run.returncode == -signal.SIGKILL, run.stdout
    said = next(line for line in run.stdout.splitlines() if line.startswith("ready"))
    return said.split()[1]


def test_an_engine_that_is_killed_leaves_whole_objects_and_nothing_else(tmp_path):
    shared = set(os.listdir("/dev/shm"))
    pid = int(killed_engine(["memory://?size=64MiB", f"file://{tmp_path}?size=1GiB"]))
    until(lambda: is_gone(pid))
    with open_store(f"file://{tmp_path}?size=1GiB") as store:
        assert all(store.get(key) is not None for key in list(store.keys()))
    assert not [path for path in (tmp_path / ".kvlab" / "writing").rglob("*") if path.is_file()]
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if "kvlab" in name]
    assert objects(tmp_path) is not None


@pytest.fixture
def server(tmp_path):
    with cache_server(tmp_path / "kvlab.sock", "512MiB") as server:
        yield server


def lent_where_it_lies(llm, server, prompts, expected):
    """Without a memory tier of its own, the engine's pages are filled from the server's memory; an engine whose session
    ends while it copies computes."""
    side = worker(llm)
    before = side.transfer.arena.clone()
    for p in prompts:
        answer = generate(llm, [p])[0]
        assert (answer.hit, answer.tokens, answer.row["tier"]) == (len(p) - 1, expected(p), "serve:memory")
    assert side.transfer.arena.equal(before), "nothing came into its slots"
    with pytest.MonkeyPatch.context() as patch:
        looks = []
        # Before the copy the session is there, after it not.
        patch.setattr(side.tiers, "has_kept", lambda session: looks.append(session) or len(looks) == 1)
        answer = generate(llm, [prompts[0]])[0]
        assert len(looks) > 1
        assert (answer.row["hit_tokens"], answer.tokens) == (0, expected(prompts[0]))
    answer = generate(llm, prompts)[-1]
    assert answer.tokens == expected(prompts[-1])
    until(lambda: server._lender.lent_bytes == 0)
    assert not side.counters


def test_engines_share_a_cache_server(server, expected):
    """What one computed another hits, with the same tokens, though a third was killed in the middle of its saves."""
    tiers = [f"kvlab://{server.path}"]
    prompts = [prompt(300), prompt(480), prompt(700), prompt(300, ending=0)]
    with engine(tiers) as llm:
        for p in prompts:
            assert generate(llm, [p])[0].tokens == expected(p)
        drain(llm)
        lent_where_it_lies(llm, server, prompts, expected)
    killed_engine(tiers)
    until(lambda: server.num_engines == 0)
    with engine(["memory://?size=64MiB", *tiers]) as llm:  # begins warm
        for _ in range(3):
            for p in prompts:
                answer = generate(llm, [p])[0]
                assert (answer.hit, answer.tokens) == (len(p) - 1, expected(p))
                # Of all but the first prompt, the beginning lies in the engine's own memory by now.
                assert answer.row["tier"] == ("serve:memory" if p is prompts[0] else "memory+serve:memory")
            empty_memory(llm)
        salted = generate(llm, [prompts[0]], salt="a")[0]
        assert (salted.hit, salted.tokens) == (0, expected(prompts[0]))
        drain(llm)
        assert server.num_engines == 1
        assert not connector(llm).hook_errors
    until(lambda: server.num_engines == 0)
