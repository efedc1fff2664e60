"""What operating systems do not have in common."""

import os
from types import ModuleType

O_DIRECT: int = getattr(os, "O_DIRECT", 0)  # 0: no file bypasses the page cache, as on macOS
O_PATH: int = getattr(os, "O_PATH", os.O_RDONLY)  # a descriptor of a folder that is only a place

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def num_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the whole machine; 64 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 64 << 30
