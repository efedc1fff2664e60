"""Copies of the CUDA driver, called with plain addresses.

A piece of a transfer is a handful of calls, and the first of them are not hidden behind any copy: through torch
(slices, `copy_`, a switch of the current stream) they cost more than the driver's own work.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html and group__CUDA__MEMOP.html
"""

import ctypes
from functools import cache
from typing import Any

from kvlab.errors import ConfigError


@cache
def driver_function(name: str, *types: Any) -> Any:
    try:
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError) as exc:
        raise ConfigError(f"the CUDA driver has no {name}; update it: {exc}") from exc
    function.argtypes = types
    return function


_COPY = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def checked(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


def copy_to_device(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Host to device on `stream`; returns at once where the host memory is pinned. All arguments are addresses."""
    checked("cuMemcpyHtoDAsync", driver_function("cuMemcpyHtoDAsync_v2", *_COPY)(target, source, num_bytes, stream))


def copy_to_host(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Device to host on `stream`; returns at once where the host memory is pinned."""
    checked("cuMemcpyDtoHAsync", driver_function("cuMemcpyDtoHAsync_v2", *_COPY)(target, source, num_bytes, stream))


def write_value(target: int, value: int, stream: int) -> None:
    """Write a 64-bit `value` to pinned host memory at `target`, once what `stream` was given before is done and can be
    seen by every process."""
    types = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint)
    write = driver_function("cuStreamWriteValue64_v2", *types)
    checked("cuStreamWriteValue64", write(stream, target, value, 0))
