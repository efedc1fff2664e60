"""Where a serving row comes from: the columns of `kvlab.machine.provenance`, with vLLM's version."""

import functools
import shlex
import sys
from pathlib import Path
from typing import Any

from kvlab.machine.provenance import provenance
from kvlab.serving.client import client_version
from kvlab.stores.url import hide_logins


@functools.cache
def serving_provenance() -> dict[str, Any]:
    """Columns that every row of one run shares. $KVLAB_COMMIT names the commit of a copy that is no checkout."""
    shared: dict[str, Any] = dict(provenance(("torch", "transformers")))
    shared["versions"] += f"; vllm {client_version()}"
    if not shared["gpu"]:
        del shared["gpu"]
    script = Path(sys.argv[0])
    if "kvlab" in (script.name, script.parent.name):
        # Without the folders of this machine.
        arguments = [argument.rpartition("/")[2] if argument.startswith("/") else argument for argument in sys.argv[1:]]
        shared["command"] = hide_logins(shlex.join(["kvlab", *arguments]))
    else:
        shared["command"] = "kvlab.serving.run(...)"
    return shared
