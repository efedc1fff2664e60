"""`ObjectCache`: tensors of KV as objects in a store."""

from collections.abc import Callable

import torch

from kvlab.auth import AuthKey
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES, KVGeometry
from kvlab.hashing import Namespace
from kvlab.hostmemory import PAGE, scratch
from kvlab.objects import HEADROOM_BYTES, OF_A_GUESS, Found, SealedObjects, check_range
from kvlab.serde import Encoded, Serde, get_serde, serde_to_read
from kvlab.serde.wire import from_parts, to_parts
from kvlab.stated import Expected
from kvlab.stores import Store
from kvlab.stores.base import ValueTooLongError, cut

MAX_TOKEN_BYTES = 16 << 20  # of KV where nothing says how much a token has; models with the most have some 5 MiB


class ObjectCache(SealedObjects):
    """KV by key in a store, under one namespace: what `CacheEngine` is made of, which has the parameters' meaning."""

    def __init__(
        self,
        store: Store | str,
        *,
        namespace: Namespace,
        serde: str = "naive",
        geometry: KVGeometry | None = None,
        auth: AuthKey | None = None,
    ) -> None:
        self.serde = get_serde(serde)
        self.geometry = geometry
        self._serdes: dict[str, Serde] = {self.serde.name: self.serde}
        super().__init__(store, namespace=namespace, auth=auth)

    def save_object(
        self,
        key: str,
        kv: torch.Tensor,
        axes: tuple[str, ...],
        *,
        first_token: int,
        end_token: int,
        confirm: Callable[[], bool] | None = None,
    ) -> bool:
        """Encode `kv`, which holds the tokens [`first_token`, `end_token`) of a prompt, and put it under `key`. Where
        others may write to `kv`, `confirm` says afterwards whether it was this object's while it was encoded; if not,
        nothing is put."""
        _check_tokens(kv, axes, first_token, end_token)
        return self.put_parts(
            key,
            lambda: to_parts(self.serde.encode(kv, axes)),
            kv_bytes=kv.numel() * kv.element_size(),
            first_token=first_token,
            end_token=end_token,
            confirm=confirm,
        )

    def load_object(
        self, key: str, out: torch.Tensor | None = None, *, axes: tuple[str, ...], first_token: int, end_token: int
    ) -> torch.Tensor | None:
        """The KV of tokens [`first_token`, `end_token`) of a prompt under `key`, into `out` if given; None on any
        miss, and then `out` may hold anything.

        Every byte is checked before it is given out, and the object must be what is asked for: these tokens and `axes`,
        the shape and dtype of `out`, or those of the engine's geometry.
        """
        if out is not None:
            _check_tokens(out, axes, first_token, end_token)
            if not out.is_contiguous():
                raise ConfigError("out must be contiguous; give a tensor of its own, or a view that is")
        return self._load(key, out, self._expected(axes, first_token, end_token, out))

    # ----

    def _expected(
        self,
        axes: tuple[str, ...],
        first_token: int,
        end_token: int,
        out: torch.Tensor | None = None,
        *,
        like: torch.Tensor | None = None,
    ) -> Expected:
        """What an object of these tokens must be: as `out`, as the geometry says, or as `like` but for its tokens."""
        tokens, num_tokens = (first_token, end_token), end_token - first_token
        if out is not None:
            return Expected(axes, tuple(out.shape), name_of(out.dtype), out.numel() * out.element_size(), tokens)
        shape = [num_tokens if axis == "tokens" else None for axis in axes]
        dtype, max_bytes = None, num_tokens * MAX_TOKEN_BYTES
        if like is not None:
            dtype = name_of(like.dtype)
            shape = [num_tokens if axis == "tokens" else n for axis, n in zip(axes, like.shape, strict=True)]
        elif self.geometry is not None and axes == AXES:
            dtype, shape = self.geometry.dtype, list(self.geometry.shape(num_tokens))
            max_bytes = num_tokens * self.geometry.bytes_per_token
        return Expected(axes, tuple(shape), dtype, max_bytes, tokens)

    def _load(self, key: str, out: torch.Tensor | None, expected: Expected) -> torch.Tensor | None:
        """`load_object` with what is expected."""
        return self.get_decoded(
            key,
            lambda: self._read(key, out, expected),
            lambda value: self._decode(value, key, out, expected),
            misfits=OF_A_GUESS if out is None else frozenset(),
        )

    def _read(self, key: str, out: torch.Tensor | None, expected: Expected) -> Found | None:
        """The object of KV for `out`: bytes as they are go to where they belong, behind a header of the usual length;
        others to memory that this thread's next read uses again, as filling fresh memory takes as long as a disk."""
        if out is None:
            return self.read_whole(key, expected.max_bytes)
        in_place = self.serde.name == "naive" and out.device.type == "cpu" and out.is_contiguous()
        size = PAGE if in_place else out.nbytes + out.nbytes // 64 + HEADROOM_BYTES
        room = scratch("objects", size)
        pieces = [room[:PAGE], out.reshape(-1).view(torch.uint8).numpy().data] if in_place else [room]
        try:
            length = self.store.get_pieces(key, pieces)
        except ValueTooLongError:
            return self.read_whole(key, expected.max_bytes)
        return None if length is None else cut(pieces, length)

    def _decode(self, value: Found, key: str, out: torch.Tensor | None, expected: Expected) -> torch.Tensor:
        container = self.opened(value, key)
        encoded: Encoded = from_parts(container.parts, container.metadata, expected)
        serde = self._serdes.get(encoded.serde)
        if serde is None:
            serde = self._serdes[encoded.serde] = serde_to_read(encoded.serde)
        if serde.name != "naive" and not isinstance(value, bytes | bytearray | memoryview) and len(value) > 1:
            return self._decode(b"".join(value), key, out, expected)  # its parts lie where the KV is to go
        kv = serde.decode(encoded, out)
        if (tuple(kv.shape), name_of(kv.dtype)) != (tuple(encoded.shape), encoded.dtype):  # of another package's serde
            raise FormatError(f"serde {serde.name!r} decodes to {kv.dtype}{list(kv.shape)}", reason="serde")
        return kv if out is None or kv is out else out.copy_(kv)  # it may leave `out` as it was


def _check_tokens(kv: torch.Tensor, axes: tuple[str, ...], first_token: int, end_token: int) -> None:
    """ConfigError unless `kv` can be the KV of tokens [first_token, end_token)."""
    check_range(first_token, end_token)
    if len(axes) != kv.dim():
        raise ConfigError(f"axes must name each of {kv.dim()} dimensions, got {axes}")
    if "tokens" in axes and (held := kv.shape[axes.index("tokens")]) != end_token - first_token:
        raise ConfigError(f"kv of tokens [{first_token}, {end_token}) must have as many, got {held}")


def name_of(dtype: torch.dtype) -> str:
    """Torch's name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")
