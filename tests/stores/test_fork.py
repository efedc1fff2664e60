"""Stores in processes that are forked from the one that opened them."""

import os
import threading

from servers import Server, running

from kvlab.stores import open_store
from kvlab.stores.disk import DiskStore
from kvlab.stores.memory import MemoryStore
from kvlab.stores.tiered import TieredStore
from kvlab.testing.machines import in_child, pattern

NUM_KEYS = 40


def value_of(index):
    return b"%04d" % index + pattern(20_000, index)


def test_no_process_reads_another_ones_replies(tmp_path):
    """Four children and the parent read at once, over what would be one socket."""
    with (
        running(Server(tmp_path / "s")) as (server,),
        open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=30000") as store,
    ):
        for index in range(NUM_KEYS):
            store.put(f"k{index}", value_of(index))
        hold = threading.Barrier(4)

        def busy():  # so that there are several idle connections to inherit
            hold.wait()
            store.get("k0")

        threads = [threading.Thread(target=busy) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        def read():
            for index in range(NUM_KEYS):
                assert bytes(store.get(f"k{index}")) == value_of(index)
            assert store.errors == {}

        codes = []
        children = [threading.Thread(target=lambda: codes.append(in_child(read))) for _ in range(4)]
        for child in children:
            child.start()
        for _ in range(3):
            read()
        for child in children:
            child.join()
        assert codes == [0] * 4
        read()


def test_a_childs_end_does_not_end_the_parents_connections(tmp_path):
    with (
        running(Server(tmp_path / "s")) as (server,),
        open_store(f"redis://127.0.0.1:{server.port}?timeout_ms=30000") as store,
    ):
        store.put("k", b"v")
        with server.client() as client:
            before = client.info("stats")["total_connections_received"]
            inherited = [connection._socket.fileno() for connection in store._topology.known()[0]._pool._open]

            def work():
                for fd in inherited:
                    try:
                        os.fstat(fd)
                    except OSError:
                        continue
                    raise AssertionError("the parent's socket is open in the child")

            assert inherited
            assert in_child(work) == 0
            assert in_child(store.close) == 0
            assert in_child(lambda: None if store.get("k") else 1 / 0) == 0
            assert bytes(store.get("k")) == b"v"
            assert client.info("stats")["total_connections_received"] - before == 1, "the one child that read"


def test_a_folder_is_locked_by_each_process_for_itself(tmp_path):
    """A child that inherited the journal's descriptor would hold the parent's lock, and the parent the child's."""
    budget = 200_000
    with DiskStore(tmp_path / "kv", budget) as store:
        store.put("k", b"v")

        def write():
            for index in range(60):
                store.put(f"k{index % 20}", bytes(9_000 + index))
                on_disk = sum(path.stat().st_size for path in (tmp_path / "kv").glob("??/*") if path.exists())
                assert on_disk <= budget

        with store._folder.index.locked():  # of the parent; the child waits for it and not for itself
            child = threading.Thread(target=lambda: codes.append(in_child(write)))
            codes = []
            child.start()
            child.join(0.05)
            assert codes == []
        write()
        child.join()
        assert codes == [0]
        assert store.used_bytes == sum(path.stat().st_size for path in (tmp_path / "kv").glob("??/*"))


def test_a_file_that_the_parent_was_writing_is_not_kept_locked_by_a_child(tmp_path):
    with DiskStore(tmp_path / "kv", 100_000, direct=False) as store:
        begun = store._folder.begin("00/x.safetensors", 1000, 0)
        assert begun is not None
        (tmp_path / "fd").write_text(str(begun[1]))

        def work():
            fd = int((tmp_path / "fd").read_text())
            try:
                os.fstat(fd)
            except OSError:
                return
            raise AssertionError("open")

        assert in_child(work) == 0
        store._folder.abandon(begun[0])


def test_a_background_writer_has_a_thread_in_the_child(tmp_path):
    first, second = MemoryStore(1 << 20), DiskStore(tmp_path / "kv", 1 << 20)
    with TieredStore([first, second], write="back") as store:
        store.put("of the parent", b"v")
        store._writer.drain(30)

        def work():
            assert store.put("of the child", b"v")
            assert store._writer.drain(30)
            assert second.contains("of the child")
            store.close()

        assert in_child(work) == 0
        assert second.contains_many(["of the parent", "of the child"]) == [True, True]
        store.put("later", b"v")
        store._writer.drain(30)
        assert second.contains("later")


def test_a_memory_store_is_copied_between_two_changes():
    """A thread is in the middle of `put` at nearly every moment; the copy must add up all the same."""
    with MemoryStore(1 << 20) as store:
        stop = threading.Event()

        def churn():
            index = 0
            while not stop.is_set():
                index += 1
                store.put(f"k{index % 7}", bytes(4096 * (1 + index % 5)))
                store.delete(f"k{(index + 3) % 7}")

        def work():
            for key in list(store.keys()):
                assert len(store.get(key)) % 4096 == 0
                store.delete(key)
            assert store.used_bytes <= 2 * 5 * 4096, "more than what two threads had begun to write"
            assert store.put("large", bytes((1 << 20) - 4 * 5 * 4096)) or store.used_bytes

        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        codes = [in_child(work) for _ in range(10)]
        stop.set()
        for thread in threads:
            thread.join()
        assert codes == [0] * 10
