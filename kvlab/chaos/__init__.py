"""Faults in what any cache stores, with a seed and counted: a proxy before a Redis, and an agent on a folder."""

from typing import TYPE_CHECKING

from kvlab.lazy import lazy

if TYPE_CHECKING:
    from kvlab.chaos.faults import Faults as Faults
    from kvlab.chaos.folder import FolderAgent as FolderAgent
    from kvlab.chaos.redis import RedisProxy as RedisProxy

_HOME = {
    "Faults": "kvlab.chaos.faults",
    "FolderAgent": "kvlab.chaos.folder",
    "RedisProxy": "kvlab.chaos.redis",
}
__all__ = [*_HOME]
__getattr__, __dir__ = lazy(__name__, _HOME)
