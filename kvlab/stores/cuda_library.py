"""NVIDIA's driver library: looked for before what needs it is tried, as that may hang without it."""

import ctypes

from kvlab.errors import ConfigError

NAME = "libcuda.so.1"


def require_cuda(what: str) -> None:
    """Raise ConfigError, in one line, where the driver's library is missing. Nothing of it is started."""
    try:
        ctypes.CDLL(NAME)
    except OSError:
        raise ConfigError(f"{what} needs {NAME} of NVIDIA's driver, which this machine does not have") from None
