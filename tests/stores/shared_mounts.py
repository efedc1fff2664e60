"""One folder mounted twice, as on two hosts: SeaweedFS over FUSE in a mount namespace of its own, which needs root.

    python scripts/get_servers.py && python tests/stores/shared_mounts.py

Says what such a mount does, and fails where kvlab does not keep its promises on it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvlab.errors import StoreError
from kvlab.machine.s3_server import S3Server, server_binary
from kvlab.machine.servers import DEBIAN, folder_of, unpacked_environment
from kvlab.stores import open_store
from kvlab.stores.disk.locks import exclude
from kvlab.testing.machines import pattern

OPTIONS = "size=256MiB&shared=true&deadline_ms=20000"


def mount(filer, place, folder):
    place.mkdir()
    command = [
        *(server_binary(), "-logtostderr=true", "mount", f"-filer=127.0.0.1:{filer}", f"-dir={place}"),
        *("-filer.path=/shared", "-allowOthers=false", f"-cacheDir={folder}/cache-{place.name}", "-dirAutoCreate"),
    ]
    environment = unpacked_environment()
    environment["PATH"] += f"{os.pathsep}{folder_of(DEBIAN)}/bin{os.pathsep}{folder_of(DEBIAN)}/usr/bin"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not os.path.ismount(place):
        assert process.poll() is None, "no mount"
        assert time.monotonic() < end, "no mount in a minute"
        time.sleep(0.1)
    return process


def within(seconds, what, work):
    end = time.monotonic() + seconds
    while not work():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.1)


def try_mounts(folder, a, b, daemon):
    print("locks of one mount exclude:", exclude(a, a), "- of two:", exclude(a, b), flush=True)
    value = pattern(5_000_000)
    with open_store(f"file://{a}/kv?{OPTIONS}") as one, open_store(f"file://{b}/kv?{OPTIONS}") as other:
        print("io:", one.stats()["io"], flush=True)
        assert one.put("k", value)
        within(60, "the other mount sees a value", lambda: other.get("k") is not None)
        assert bytes(other.get("k")) == value
        for index in range(20):  # a value of one mount is replaced by the other's: a reader sees one of them whole
            (one if index % 2 else other).put("same", pattern(300_000 + index, index))
            got = (other if index % 2 else one).get("same")
            assert got is None or bytes(got) in [pattern(300_000 + seed, seed) for seed in range(index + 1)]
        refused = 0
        for index in range(100):
            store = one if index % 2 else other
            try:
                refused += not store.put(f"many{index}", pattern(6_000_000, index))
            except StoreError as error:
                print("put:", error.reason, flush=True)
                refused += 1
        time.sleep(5)
        found = sum(path.stat().st_size for path in (a / "kv").rglob("*.safetensors"))
        print(f"{refused} of 100 puts refused; {found >> 20} MiB in a budget of 256", flush=True)
        daemon.send_signal(signal.SIGSTOP)
        try:
            for call in (lambda: one.get("never"), lambda: one.put("l", value), lambda: one.contains_many(["z"])):
                start = time.monotonic()
                try:
                    call()
                except StoreError as error:
                    print(f"hangs: {error.reason} after {time.monotonic() - start:.1f} s", flush=True)
                assert time.monotonic() - start < 40
        finally:
            daemon.send_signal(signal.SIGCONT)
        within(60, "the mount is back", lambda: quietly(one))


def quietly(store):
    try:
        return store.put("again", b"v") and bytes(store.get("again")) == b"v"
    except StoreError:
        return False


def main():
    if "--here" not in sys.argv:
        command = ["unshare", "-m", "--propagation", "private", sys.executable, __file__, "--here"]
        sys.exit(subprocess.run(command).returncode)
    with tempfile.TemporaryDirectory() as name, S3Server() as server:
        folder = Path(name)
        a, b = folder / "a", folder / "b"
        daemons = [mount(server.filer_port, place, folder) for place in (a, b)]
        try:
            try_mounts(folder, a, b, daemons[0])
        finally:
            for daemon in daemons:
                daemon.kill()
                daemon.wait()
            for place in (a, b):
                subprocess.run(["umount", "-l", str(place)])


if __name__ == "__main__":
    main()
