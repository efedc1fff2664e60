"""Which images, videos and sounds does a request hold? Named by content.

vLLM's identifier of an input is no name that outlives the process: it is the hash of the input, or the uuid that the
client gave, or, with `mm_processor_cache_gb=0` and without prefix caching, a counter. So a key also holds the digest of
the processed input. vLLM keeps encoder outputs by identifier, so an identifier of two different inputs names nothing:
the KV of the second may come from the encoder output of the first.
"""

import logging
from collections.abc import Iterator, Sequence, Set
from typing import Any

import numpy as np
import torch
from blake3 import blake3

logger = logging.getLogger("vllm.kvlab")
KEPT_IDENTIFIERS = 1 << 18  # with their digests some 100 MB, where so many are in use


class MediaNames:
    """Names of multimodal inputs, for one engine."""

    def __init__(self, kept: int = KEPT_IDENTIFIERS) -> None:
        self._kept = kept
        # By identifier, the least recently used first; None: of several inputs.
        self._digests: dict[str, str | None] = {}
        self._requests: dict[str, list[str | None]] = {}
        self._users: dict[str, set[str]] = {}  # identifier -> the requests that live and hold it
        self._spoilt: set[str] = set()
        self._is_logged = False

    def names(self, features: Sequence[Any], request_id: str) -> list[str] | None:
        """A name for each of a request's `mm_features`; None if one of them cannot be named. To be called for every
        request, those without the cache too, as each may bring the encoder output of an identifier."""
        if not features:
            return []
        if request_id not in self._requests:  # their inputs are hashed once, however often the engine asks
            self._requests[request_id] = [self._name(feature, request_id) for feature in features]
        found = self._requests[request_id]
        if None not in found:
            return [name for name in found if name is not None]
        if not self._is_logged:
            self._is_logged = True
            logger.warning(
                "kvlab: an image, video or sound has no name by content (its data lies in shared memory, or other data "
                "came under the same uuid); such requests go without the cache"
            )
        return None

    def take_spoilt(self) -> set[str]:
        """Requests whose names hold no longer, since the last call: what they compute from now on may come of other
        input."""
        spoilt, self._spoilt = self._spoilt, set()
        return spoilt

    def forget(self, request_id: str) -> None:
        """The request is finished."""
        if self._requests.pop(request_id, None) is None:
            return
        for identifier in [one for one, users in self._users.items() if request_id in users]:
            self._users[identifier].discard(request_id)
            if not self._users[identifier]:
                del self._users[identifier]

    def _name(self, feature: Any, request_id: str) -> str | None:
        identifier = feature.identifier
        if identifier is None:
            return None
        users = self._users.setdefault(identifier, set())
        users.add(request_id)
        digest = _digest(feature.data)
        if digest is None:
            return None
        known = self._digests.pop(identifier, digest)
        if known != digest:
            if known is not None:
                self._spoil(users - {request_id})
            digest = None
        self._digests[identifier] = digest
        if len(self._digests) > self._kept:
            oldest = next((one for one in self._digests if one not in self._users), None)
            if oldest is not None:
                del self._digests[oldest]
        return None if digest is None else f"{digest}:{identifier}"

    def _spoil(self, request_ids: Set[str]) -> None:
        """Other input has come under an identifier of these requests."""
        for request_id in request_ids:
            self._requests[request_id] = [None]
            self._spoilt.add(request_id)


def _digest(data: Any) -> str | None:
    """Of one input's processed fields (`MultiModalKwargsItem`). None where they are not here: an address in shared
    memory, or data that is kept elsewhere."""
    if data is None or "address" in data:
        return None
    hasher = blake3()
    try:
        for name in sorted(data):
            for piece in _pieces([name, data[name].data]):
                hasher.update(piece)
    except TypeError:
        return None
    return hasher.hexdigest()


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    """Bytes that differ where values do: each with its type and its length."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().cpu().contiguous()
        yield f"tensor {whole.dtype} {tuple(whole.shape)} ".encode()
        yield whole.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"array {value.dtype.str} {value.shape} ".encode()
        yield value.tobytes()
    elif isinstance(value, list | tuple):
        yield f"list {len(value)} ".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, str | bytes | int | float):
        text = value if isinstance(value, bytes) else repr(value).encode()
        yield f"{type(value).__name__} {len(text)} ".encode()
        yield text
    else:
        raise TypeError(f"cannot name a {type(value).__name__}")
