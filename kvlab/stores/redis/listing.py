"""The keys of all values on some servers, by SCAN: within a deadline and bounded memory."""

import sys
import time
from collections.abc import Iterable, Iterator

from kvlab.stores.redis.node import RedisNode
from kvlab.stores.redis.replies import PREFIX, name_of, scanned
from kvlab.stores.redis.resp import ReplyError, number, send_command, send_pipeline
from kvlab.stores.wire import ProtocolError
from kvlab.units import format_bytes

LISTING = 60  # times the deadline of a call: how long a list of all keys may take
MOST_LISTED_BYTES = 1 << 29  # of memory for names; a server that goes on naming keys is not listened to for ever
ENTRY_BYTES = 104  # what a dict has for a name besides it
_LEFT = frozenset({"wrongtype", "moved", "ask"})  # what STRLEN says of another program's list, and of a slot on its way


def listed(nodes: Iterable[RedisNode], timeout_s: float) -> dict[str, None]:
    """The keys on `nodes`, each once; `timeout_s` is what one call may take."""
    found: dict[str, None] = {}
    end, held = time.monotonic() + LISTING * timeout_s, 0
    for node in nodes:
        for keys in _scans(node, timeout_s, end):
            held += sum(sys.getsizeof(key) + ENTRY_BYTES for key in keys)
            if held > MOST_LISTED_BYTES:
                raise ProtocolError(f"the server listed more than {format_bytes(MOST_LISTED_BYTES)} of names")
            found.update(dict.fromkeys(keys))
    return found


def _scans(node: RedisNode, timeout_s: float, end: float) -> Iterator[list[str]]:
    cursor, only = b"0", ["TYPE", "string"]
    while True:
        deadline = min(time.monotonic() + timeout_s, end)
        command = ["SCAN", cursor, "MATCH", PREFIX + b"*", "COUNT", "1000", *only]
        try:
            cursor, keys = node.run(send_command(command, deadline, scanned), deadline)
        except ReplyError as error:
            if error.reason != "err" or not only:
                raise
            only = []  # Redis before 6 knows no TYPE here
            continue
        yield keys if only else _strings(node, keys, deadline)
        if cursor == b"0":
            return


def _strings(node: RedisNode, keys: list[str], deadline: float) -> list[str]:
    """Those of `keys` that are no other program's list or hash."""
    asked = [["STRLEN", name_of(key)] for key in keys]
    sizes = node.run(send_pipeline(asked, deadline, number, _LEFT), deadline) if asked else []
    return [
        key
        for key, size in zip(keys, sizes, strict=True)
        if not (isinstance(size, ReplyError) and size.reason == "wrongtype")
    ]
