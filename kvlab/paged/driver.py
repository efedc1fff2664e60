"""Copies of the CUDA driver, called with plain addresses.

A piece of a transfer is a handful of calls, and the first of them are not hidden behind any copy: through torch
(slices, `copy_`, a switch of the current stream) they cost more than the driver's own work. `copy_batch` is
cuMemcpyBatchAsync, which torch does not offer. https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.errors import ConfigError

_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    _fields_ = [("order", ctypes.c_int), ("source", _Location), ("target", _Location), ("flags", ctypes.c_uint)]


@cache
def _function(name: str, *types: Any) -> Any:
    try:
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
    except (OSError, AttributeError) as exc:
        raise ConfigError(f"the CUDA driver has no {name}; update it (12.8 or later): {exc}") from exc
    function.argtypes = types
    return function


_COPY = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_BATCH = (
    (ctypes.c_void_p,) * 3 + (ctypes.c_size_t,) + (ctypes.c_void_p,) * 2 + (ctypes.c_size_t,) + (ctypes.c_void_p,) * 2
)


def _checked(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"{name} failed with CUDA error {status}")


def copy_to_device(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Host to device on `stream`; returns at once where the host memory is pinned. All arguments are addresses."""
    _checked("cuMemcpyHtoDAsync", _function("cuMemcpyHtoDAsync_v2", *_COPY)(target, source, num_bytes, stream))


def copy_to_host(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Device to host on `stream`; returns at once where the host memory is pinned."""
    _checked("cuMemcpyDtoHAsync", _function("cuMemcpyDtoHAsync_v2", *_COPY)(target, source, num_bytes, stream))


def _address(array: NDArray[np.int64]) -> int:
    """array.ctypes.data, which takes twice as long; refuses what is not contiguous."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def copy_batch(targets: NDArray[np.int64], sources: NDArray[np.int64], sizes: NDArray[np.int64], stream: int) -> None:
    """Many copies in one call, in any order among themselves, on `stream` (not the default one). Three contiguous
    arrays of one length, not empty: addresses, addresses, bytes."""
    attributes = _Attributes(order=_STREAM_ORDER)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    status = _function("cuMemcpyBatchAsync", *_BATCH)(
        _address(targets),
        _address(sources),
        _address(sizes),
        sizes.size,
        ctypes.addressof(attributes),
        ctypes.addressof(first),
        1,
        ctypes.addressof(failed),
        stream,
    )
    _checked("cuMemcpyBatchAsync", status)
