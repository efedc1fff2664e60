"""Removal of a value and of nothing else: the server looks and removes in one step, by a script."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from kvlab.stores.base import Value, buffers
from kvlab.stores.redis.resp import ReplyError, RespConnection, flag

HEAD_BYTES = 8  # what was read is compared as a head if it is longer, else as the whole value (`Store.still_holds`)

# `pcall` gives an error as a table. For another program's list that is WRONGTYPE, which the script answers with.
_DELETE = """
local size = redis.pcall('STRLEN', KEYS[1])
if type(size) == 'table' then return size end
return redis.call('UNLINK', KEYS[1])
"""
_DELETE_IF = """
local head = redis.pcall('GETRANGE', KEYS[1], 0, ARGV[1])
if type(head) == 'table' then return head end
if redis.sha1hex(head) ~= ARGV[2] then return 0 end
return redis.call('UNLINK', KEYS[1])
"""
_NO_SCRIPT = frozenset({"noperm", "err", "refused"})  # EVAL, or a command in it, is unknown or not allowed


def remove(name: bytes, found: Value | None, deadline: float) -> Callable[[RespConnection], bool | None]:
    """The work of removing the value of `name`, if it is `found` where that is given. Whether it was there; None where
    the server runs no scripts for this user, and nothing was done."""
    command: Sequence[Any] = ["EVAL", _DELETE, "1", name]
    if found is not None:
        pieces, digest = buffers(found), hashlib.sha1(usedforsecurity=False)
        for piece in pieces:
            digest.update(piece)
        last = max(sum(piece.nbytes for piece in pieces), HEAD_BYTES) - 1
        command = ["EVAL", _DELETE_IF, "1", name, str(last), digest.hexdigest()]

    def work(connection: RespConnection) -> bool | None:
        try:
            return flag(connection.call(command, deadline))
        except ReplyError as error:
            if error.reason == "wrongtype":
                return False
            if error.reason in _NO_SCRIPT:
                return None
            raise

    return work
