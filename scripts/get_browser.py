"""See that a Chrome or Chromium is there for tests/test_lab.py; as root on Debian or Ubuntu, install one.

    python scripts/get_browser.py

No package of a Python index holds one. Where none can be installed, one line says so, and the test fails with it too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.browser import find


def main() -> None:
    try:
        find()
        return
    except RuntimeError as error:
        missing = error
    if shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-q", "-y", "chromium"]):
            print("+", " ".join(command), flush=True)
            subprocess.run(command, stdout=subprocess.DEVNULL)
        if shutil.which("chromium"):
            return
    print(missing, file=sys.stderr)


if __name__ == "__main__":
    main()
