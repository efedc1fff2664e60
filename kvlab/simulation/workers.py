"""Run jobs in processes of their own, however this one was started.

Each worker is a fresh ``python -m kvlab.simulation.workers`` that gets what all jobs share once and then one job after
the other over its pipes. Neither a fork (threads, CUDA) nor a second import of the caller's script is involved.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from queue import Empty, Queue
from typing import Any, BinaryIO


def run_jobs(function: str, shared: Any, jobs: Sequence[Any], *, workers: int) -> Iterator[tuple[int, Any]]:
    """``module:function`` applied to (shared, job); yields (index of the job, result) as they get ready.

    What a job raises is raised here. With one worker, or one job, all happens in this process.
    """
    if workers <= 1 or len(jobs) <= 1:
        call = _function(function)
        for index, job in enumerate(jobs):
            yield index, call(shared, job)
        return
    todo: Queue[int] = Queue()
    done: Queue[tuple[int, bool, Any]] = Queue()
    for index in range(len(jobs)):
        todo.put(index)
    processes: list[subprocess.Popen[bytes]] = []
    threads: list[threading.Thread] = []
    head = pickle.dumps((function, shared))
    try:
        for _ in range(min(workers, len(jobs))):
            processes.append(_start())
            feed = threading.Thread(target=_feed, args=(processes[-1], head, jobs, todo, done), daemon=True)
            feed.start()
            threads.append(feed)
        for _ in range(len(jobs)):
            index, succeeded, result = done.get()
            if not succeeded:
                raise result
            yield index, result
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()


def _start() -> "subprocess.Popen[bytes]":
    here = str(Path(__file__).resolve().parents[2])  # this very package, even if only sys.path knows of it
    path = os.pathsep.join([here, *(place or os.getcwd() for place in sys.path)])  # classes of the caller's too
    command = [sys.executable, "-m", "kvlab.simulation.workers"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        process_group=0 if os.name == "posix" else None,  # ctrl-C is the caller's, who ends them
    )


def _feed(
    process: "subprocess.Popen[bytes]", head: bytes, jobs: Sequence[Any], todo: "Queue[int]", done: "Queue[Any]"
) -> None:
    """Give `process` jobs until there are none; a process that dies fails the job it had."""
    index = -1
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(head)
        while True:
            index = todo.get_nowait()
            pickle.dump(pickle.dumps(jobs[index]), process.stdin)
            process.stdin.flush()
            done.put((index, *pickle.load(process.stdout)))
    except Empty:
        process.stdin.close()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        done.put((index, False, RuntimeError(f"a worker process ended with status {process.wait()} ({error!r})")))
        process.stdout.close()


def _function(name: str) -> Callable[[Any, Any], Any]:
    module, _, attribute = name.partition(":")
    function: Callable[[Any, Any], Any] = getattr(import_module(module), attribute)
    return function


def _work(source: BinaryIO, sink: BinaryIO) -> None:
    try:
        name, shared = pickle.load(source)
    except (EOFError, pickle.UnpicklingError):  # the caller has left
        return
    function = _function(name)
    while True:
        try:
            job = pickle.load(source)
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = (True, function(shared, pickle.loads(job)))
        except Exception as error:
            answer = (False, error)
        pickle.dump(answer, sink)
        sink.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a job prints must not mix with the answers
    _work(sys.stdin.buffer, answers)
