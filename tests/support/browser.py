"""A headless Chrome or Chromium, driven over the DevTools protocol. Needs no driver and no download."""

import itertools
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import websocket  # websocket-client, which Jupyter's server brings

from kvlab.machine.processes import Child

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chromium-headless-shell")
MISSING = "no Chrome or Chromium found: install one (Debian: apt-get install chromium) or name it by BROWSER_PATH"


def find() -> str:
    """The browser's program. Raises RuntimeError with what to do."""
    named = os.environ.get("BROWSER_PATH")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None or not Path(found).exists():
        raise RuntimeError(MISSING)
    return found


class Browser:
    """One page. `with Browser() as page: page.open(url); page.value("1 + 1")`."""

    def __init__(self, *, dark: bool = False, width: int = 1300, height: int = 2400) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="kvlab-browser-", ignore_cleanup_errors=True)
        command = [find(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += [
            f"--user-data-dir={self._home.name}",
            f"--window-size={width},{height}",
            "--remote-debugging-port=0",
        ]
        command += ["--force-dark-mode"] if dark else []
        self._log = Path(self._home.name, "log")  # no pipe: a full one that is read no more would stop it
        with self._log.open("wb") as out:
            self._process = Child([*command, "about:blank"], out)
        self._ids = itertools.count(1)
        self._socket = websocket.create_connection(self._page_address(), timeout=300, suppress_origin=True)

    def _page_address(self) -> str:
        """The address of its first page: the browser says on stderr where it listens."""
        import urllib.request

        while not (found := re.search(rb"DevTools listening on ws://([^/]+)/", self._log.read_bytes())):
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the browser ended before it listened: {self._log.read_text(errors='replace')[-500:]}"
                )
            time.sleep(0.05)
        host = found[1].decode()
        while True:  # it listens before its first page is there
            with urllib.request.urlopen(f"http://{host}/json") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
            time.sleep(0.1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return dict(message["result"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """What `script` comes to in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def picture(self, path: Path) -> None:
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.end()
        self._home.cleanup()
