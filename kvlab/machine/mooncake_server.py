"""A Mooncake Store of one's own, for measurements and tests: a master and a node with memory, on free ports."""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from kvlab.machine.processes import Child
from kvlab.machine.servers import START_S, OwnServer, free_port, make_importable, unpacked_environment


class MooncakeServer(OwnServer):
    """`kill` ends the master, `kill_node` the node, which has the values. After `start` the node must come back."""

    name = "Mooncake"

    def __init__(self, *, memory: str = "512MB") -> None:
        self._programs = programs()
        self._memory = memory
        self._node: Child | None = None
        self.numbers_port, self.node_port = free_port(), free_port()
        super().__init__()
        self.start_node()

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.port}?metrics_port={self.numbers_port}"

    def command(self) -> list[str]:
        ports = [f"--rpc_port={self.port}", "--metrics_host=127.0.0.1", f"--metrics_port={self.numbers_port}"]
        return [str(self._programs / "mooncake_master"), "--rpc_address=127.0.0.1", *ports]

    def environment(self) -> Mapping[str, str]:
        return {**unpacked_environment(), "GLOG_logtostderr": "1"}

    def start_node(self) -> None:
        self._node = Child(
            [
                *(str(self._programs / "mooncake_client"), "--host=127.0.0.1", f"--port={self.node_port}"),
                *(f"--master_server_address=127.0.0.1:{self.port}", "--metadata_server=P2PHANDSHAKE"),
                *("--protocol=tcp", f"--global_segment_size={self._memory}", "--threads=1"),
            ],
            self._log,
            self.environment(),
        )
        end = time.monotonic() + START_S
        while not self._has_memory():
            if self._node.poll() is not None or time.monotonic() > end:
                self.kill_node()
                raise self._failed()
            time.sleep(0.05)

    def kill_node(self) -> None:
        if self._node is not None:
            self._node.kill()

    def __exit__(self, *error: object) -> None:
        self.kill_node()
        super().__exit__(*error)

    def _has_memory(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.numbers_port), 5) as sock:
            sock.sendall(b"GET /get_all_segments HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            sock.settimeout(5)
            text = b""
            while part := sock.recv(1 << 16):
                text += part
            return b"127.0.0.1" in text.partition(b"\r\n\r\n")[2]
        return False


def programs() -> Path:
    """Where the master lies. Makes the library that lies there importable, in processes of this one too."""
    make_importable("mooncake", "mooncake")
    os.environ.update(unpacked_environment())  # for the process that the store starts
    spec = find_spec("mooncake")
    places = spec.submodule_search_locations if spec is not None else None
    found = Path(next(iter(places or [""])))
    for program in ("mooncake_master", "mooncake_client"):
        with suppress(OSError):
            os.chmod(found / program, 0o755)
    return found
