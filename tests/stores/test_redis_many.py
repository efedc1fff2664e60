"""Several real servers: replicas behind sentinels, and a cluster."""

import time

import pytest
from servers import Server, running, wait_for

from kvlab.errors import StoreError
from kvlab.stores import open_store
from kvlab.stores.redis.replies import name_of
from kvlab.testing.machines import pattern


@pytest.fixture
def sentinel_world(tmp_path):
    master = Server(tmp_path / "m")
    replicas = [Server(tmp_path / f"r{index}", f"replicaof 127.0.0.1 {master.port}") for index in range(2)]
    watch = (
        f"sentinel monitor mymaster 127.0.0.1 {master.port} 2",
        "sentinel down-after-milliseconds mymaster 400",
        "sentinel failover-timeout mymaster 3000",
    )
    sentinels = [Server(tmp_path / f"w{index}", *watch, sentinel=True) for index in range(3)]
    with running(master, *replicas, *sentinels):
        yield master, replicas, sentinels


def size_of(server):
    with server.client() as client:
        return client.dbsize()


def ready(sentinels):
    for sentinel in sentinels:
        with sentinel.client() as client:
            state = client.sentinel_master("mymaster")
            if state["num-slaves"] != 2 or state["num-other-sentinels"] != 2:
                return False
    return True


def test_writes_go_on_after_the_master_is_killed(sentinel_world):
    master, replicas, sentinels = sentinel_world
    wait_for(lambda: ready(sentinels), "the sentinels to know each other")
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    with open_store(f"redis-sentinel://{hosts}/mymaster?timeout_ms=20000&retry_ms=20&longest_retry_ms=100") as store:
        written = {}
        for index in range(20):
            assert store.put(f"k{index}", pattern(5000, index))
            written[f"k{index}"] = pattern(5000, index)
        wait_for(lambda: all(size_of(replica) == 20 for replica in replicas), "the replicas to catch up")
        master.kill()
        failed = 0
        while True:  # until a write succeeds
            try:
                assert store.put("after", pattern(5000, 99))
                break
            except StoreError:
                failed += 1
                time.sleep(0.05)
        assert failed > 0
        assert store.errors["timeout"] == 0, "a dead server was waited for"
        assert bytes(store.get("after")) == pattern(5000, 99)
        for key, value in written.items():
            got = store.get(key)
            assert got is not None
            assert bytes(got) == value


def test_a_dead_sentinel_and_an_unknown_master_are_told_apart(sentinel_world):
    _, _, sentinels = sentinel_world
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    sentinels[0].kill()
    with open_store(f"redis-sentinel://{hosts}/mymaster") as store:
        assert store.put("k", b"v")
    with open_store(f"redis-sentinel://{hosts}/nobody") as store:
        with pytest.raises(StoreError):
            store.put("k", b"v")
        assert store.errors["no_master"] == 1


@pytest.fixture
def cluster(tmp_path):
    settings = ("cluster-enabled yes", "cluster-node-timeout 1000", "cluster-require-full-coverage no")
    nodes = [Server(tmp_path / f"n{index}", *settings) for index in range(3)]
    with running(*nodes):
        for index, node in enumerate(nodes):
            with node.client() as client:
                low, high = [(0, 5460), (5461, 10922), (10923, 16383)][index]
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", low, high)
                if index:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        wait_for(lambda: all(sees_three(node) for node in nodes), "the cluster to form")
        yield nodes


def sees_three(node):
    with node.client() as client:
        info = client.execute_command("CLUSTER", "INFO").decode()
    return "cluster_state:ok" in info and "cluster_known_nodes:3" in info and "cluster_slots_assigned:16384" in info


def url_of(nodes, options="timeout_ms=20000&retry_ms=50&longest_retry_ms=200"):
    return "redis-cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes) + f"?{options}"


def test_keys_spread_and_lookups_ask_each_node_once(cluster):
    with open_store(url_of(cluster[:1])) as store:
        for index in range(60):
            assert store.put(f"k{index}", pattern(1000, index))
        for node in cluster:
            with node.client() as client:
                assert client.dbsize() > 5
        assert sorted(store.keys()) == sorted(f"k{index}" for index in range(60))
        calls = exists_calls(cluster)
        found = store.contains_many([f"k{index}" for index in range(100)])
        assert found == [True] * 60 + [False] * 40
        assert exists_calls(cluster) - calls == 100
        assert all(bytes(store.get(f"k{index}")) == pattern(1000, index) for index in range(60))
        assert store.used_bytes > 60_000
        assert store.errors == {}


def exists_calls(nodes):
    total = 0
    for node in nodes:
        with node.client() as client:
            total += client.info("commandstats").get("cmdstat_exists", {}).get("calls", 0)
    return total


def test_a_slot_that_moved_is_followed(cluster):
    from redis.crc import key_slot

    with open_store(url_of(cluster)) as store:
        store.put("before", b"v")  # the store knows who has which slot
        key = next(f"m{index}" for index in range(1000) if key_slot(name_of(f"m{index}")) < 5461)
        with cluster[1].client() as client:
            new_owner = client.execute_command("CLUSTER", "MYID")
        for node in (cluster[1], cluster[0], cluster[2]):
            with node.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", key_slot(name_of(key)), "NODE", new_owner)
        assert store.contains_many([key, "before"]) == [False, True]
        assert store.put(key, b"moved")
        assert bytes(store.get(key)) == b"moved"
        with cluster[1].client() as client:
            assert client.get(name_of(key)) == b"moved"
        assert sum(store.errors.values()) == 0


def test_the_keys_of_a_killed_node_are_misses_and_the_others_stay(cluster):
    with open_store(url_of(cluster)) as store:
        for index in range(60):
            store.put(f"k{index}", pattern(1000, index))
        cluster[2].kill()
        got = [store.get(f"k{index}") for index in range(60)]
        assert store.errors["timeout"] == 0, "a dead server was waited for"
        lost = [index for index, value in enumerate(got) if value is None]
        assert 0 < len(lost) < 40
        assert all(bytes(value) == pattern(1000, index) for index, value in enumerate(got) if value is not None)
        assert store.contains_many([f"k{index}" for index in range(60)]) == [value is not None for value in got]
        assert store.why_missing(f"k{lost[0]}") == "tier_down"
        assert store.put(f"k{lost[0]}", b"v") is False
        assert sum(store.errors.values()) > 0
        cluster[2].start()
        wait_for(lambda: store.put(f"k{lost[0]}", b"v"), "the node to come back")
        assert bytes(store.get(f"k{lost[0]}")) == b"v"


def test_keys_of_a_slot_on_its_way_are_found_where_they_are(cluster):
    """A node that takes a slot over answers one command after each ASKING."""
    from redis.crc import key_slot

    with open_store(url_of(cluster)) as store:
        tag = next(index for index in range(1000) if key_slot(b"%d" % index) < 5461)
        moved, stays, absent = (f"{{{tag}}}{end}" for end in "abc")
        slot = key_slot(name_of(moved))
        assert store.put(moved, b"moved")
        assert store.put(stays, b"stays")
        with cluster[0].client() as source, cluster[1].client() as target:
            source_id, target_id = (client.execute_command("CLUSTER", "MYID") for client in (source, target))
            target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            source.execute_command("MIGRATE", "127.0.0.1", cluster[1].port, name_of(moved), 0, 60_000)
        assert store.contains_many([moved, stays, absent]) == [True, True, False]
        assert bytes(store.get_head(moved, 2)) == b"mo"
        assert store.quarantine(moved, "test", b"moved") is True
        assert store.quarantine(stays, "test", b"stays") is True
        assert store.contains_many([moved, stays]) == [False, False]
        assert sum(store.errors.values()) == 0
