"""Hides packages and programs from every Python process that has this folder on its PYTHONPATH.

`KVLAB_TEST_HIDDEN` and `KVLAB_TEST_HIDDEN_PROGRAMS` name them: to an import they are as if they were not installed, and
a program of theirs does not start. Only the standard library is there.
"""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset(os.environ.get("KVLAB_TEST_HIDDEN", "").split())
PROGRAMS = frozenset(os.environ.get("KVLAB_TEST_HIDDEN_PROGRAMS", "").split())


class Visible(PathFinder):
    """Finds all but what is hidden."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


def watch(event, args):
    if event == "subprocess.Popen" and os.path.basename(os.fsdecode(args[0])) in PROGRAMS:
        raise FileNotFoundError(f"{os.fsdecode(args[0])} is not in the environment of make lab")


if HIDDEN:
    sys.meta_path[:] = [Visible if finder is PathFinder else finder for finder in sys.meta_path]
    sys.addaudithook(watch)
