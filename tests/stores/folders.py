"""What a store's folder holds."""

import contextlib
import os


def bytes_in(root):
    """Bytes of its files but for the journal, without those that go meanwhile. Tests ask after every step."""
    found = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name != "journal":
                with contextlib.suppress(FileNotFoundError):
                    found += os.lstat(os.path.join(folder, name)).st_size
    return found
