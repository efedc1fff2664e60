"""A folder on a file system that is really full, again and again: a small tmpfs in a mount namespace of its own, which
needs root. By hand: ``python tests/stores/full_disk.py [seconds]``. CI has the same with injected errors, and a full
file by RLIMIT_FSIZE (test_disk_faults.py, test_disk.py)."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from folders import bytes_in

from kvlab.container import Part, pack, unpack
from kvlab.errors import FormatError, StoreError
from kvlab.stores.disk import DiskStore

FILE_SYSTEM = 3 << 20


def churn(root, budget, seed, seconds):
    """One of several processes: everything a store does, with a ballast file that fills the rest now and then."""
    draw, done, end = random.Random(seed), Counter(), time.monotonic() + seconds
    ballast = root.parent / f"ballast-{seed}"
    with DiskStore(root, budget) as store:
        while time.monotonic() < end:
            key, act = f"k{draw.randrange(30)}", draw.random()
            try:
                if act < 0.6:
                    data = draw.randbytes(draw.randrange(100, 250_000))
                    done[
                        "put" if store.put(key, pack(key, {"kv": Part("U8", (len(data),), memoryview(data))})) else "no"
                    ] += 1
                elif act < 0.7:
                    store.delete(key)
                elif act < 0.75:
                    store.quarantine(key, "test")
                elif act < 0.95:
                    value = store.get(key)
                    if value is not None:
                        unpack(value, key)
                        done["sound"] += 1
                else:
                    ballast.unlink(missing_ok=True)
                    if draw.random() < 0.7:
                        try:
                            ballast.write_bytes(bytes(draw.randrange(FILE_SYSTEM)))
                        except OSError:
                            done["filled"] += 1
            except StoreError as error:
                done[error.reason] += 1
            except FormatError as error:
                sys.exit(f"a broken object was served: {error}")
    ballast.unlink(missing_ok=True)
    print(f"budget {budget:,}, process {seed}: {dict(done)}", flush=True)


def main(seconds):
    place = Path("/tmp")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FILE_SYSTEM}", "tmpfs", place], check=True)
    for number, budget in enumerate((FILE_SYSTEM // 2, 4 * FILE_SYSTEM)):  # below what is there, and far above
        root = place / f"kv{number}"
        pids = []
        for seed in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    churn(root, budget, seed, seconds / 2)
                    os._exit(0)
                except BaseException as error:
                    print(f"process {seed}: {type(error).__name__}: {error}", flush=True)
                    os._exit(1)
            pids.append(pid)
        most, looks, left = 0, 0, set(pids)
        with DiskStore(root, budget) as witness:
            while left:
                try:
                    with witness._folder.index.locked():  # or files counted twice on their way would be an error
                        held, counted = bytes_in(root), witness._folder.index.used
                    most, looks = max(most, held), looks + 1
                    assert held <= counted <= budget, f"{held} bytes, counted as {counted}, in a budget of {budget}"
                except OSError as error:
                    print(f"the witness could not look: {error}")
                left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
                time.sleep(0.005)
        with DiskStore(root, budget) as store:
            assert store.used_bytes == bytes_in(root)
            for key in list(store.keys()):
                unpack(store.get(key), key)
            store.clear()
            assert store.put("after", bytes(100_000)), "it did not recover"
        print(f"budget {budget:,}: at most {most:,} bytes in {looks} looks; sound and recovered", flush=True)
        subprocess.run(["rm", "-r", root], check=True)


if __name__ == "__main__":
    if os.environ.get("OWN_MOUNTS"):
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
    else:
        command = ["unshare", "--mount", sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env={**os.environ, "OWN_MOUNTS": "1"}).returncode)
