"""Which images, videos and sounds does a request hold? Named by content.

vLLM's identifier of an input is no name that outlives the process: it is the hash of the input, or the uuid that the
client gave, or, with `mm_processor_cache_gb=0` and without prefix caching, a counter. So a key also holds the digest of
the processed input. vLLM keeps encoder outputs by identifier, so an identifier of two different inputs names nothing:
the KV of the second may come from the encoder output of the first.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from blake3 import blake3

logger = logging.getLogger("vllm.kvlab")
KEPT_IDENTIFIERS = 1 << 16


class MediaNames:
    """Names of multimodal inputs, for one engine."""

    def __init__(self) -> None:
        self._digests: dict[str, str | None] = {}  # by identifier, the oldest first; None: of several inputs
        self._requests: dict[str, list[str | None]] = {}
        self._is_logged = False

    def names(self, features: Sequence[Any], request_id: str) -> list[str] | None:
        """A name for each of a request's `mm_features`; None if one of them cannot be named. To be called for every
        request, those without the cache too, as each may bring the encoder output of an identifier."""
        if not features:
            return []
        if request_id not in self._requests:  # their inputs are hashed once, however often the engine asks
            self._requests[request_id] = [self._name(feature) for feature in features]
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

    def forget(self, request_id: str) -> None:
        """The request is finished."""
        self._requests.pop(request_id, None)

    def _name(self, feature: Any) -> str | None:
        if feature.identifier is None:
            return None
        digest = _digest(feature.data)
        if digest is not None:
            known = self._digests.get(feature.identifier, digest)
            self._digests[feature.identifier] = digest if known == digest else None
            if len(self._digests) > KEPT_IDENTIFIERS:
                del self._digests[next(iter(self._digests))]
            digest = self._digests[feature.identifier]
        return None if digest is None else f"{digest}:{feature.identifier}"


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
