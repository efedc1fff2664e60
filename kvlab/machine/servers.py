"""Where servers lie that no package of the environment brings: scripts/get_servers.py puts them beside it."""

import os
import sys
from pathlib import Path

FOLDER = "KVLAB_SERVERS"  # in the environment: another place


def folder_of(name: str) -> Path:
    """The folder of the server `name`, which need not be there."""
    return Path(os.environ.get(FOLDER) or Path(sys.prefix) / "servers") / name
