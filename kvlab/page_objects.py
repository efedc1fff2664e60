"""`PageObjects`: an engine's slots as objects in a store, without PyTorch where they are stored as they are.

A slot holds a block: its pages, or what a codec made of them in the engine. Such coded blocks are stored as they are
too, as ``int4-blocks`` and the like: no reader that wants pages, or chunks, takes them for such.
"""

import copy
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlab.auth import AuthKey
from kvlab.container import Container, Part
from kvlab.errors import ConfigError, FormatError
from kvlab.hashing import Namespace, versioned
from kvlab.hostmemory import PAGE, address, scratch
from kvlab.objects import HEADROOM_BYTES, Found, SealedObjects, check_range
from kvlab.stated import Expected, is_chunked, is_coded, metadata_of, stated
from kvlab.stores import Store
from kvlab.stores.base import ValueTooLongError, cut

PAGE_AXES = ("blocks", "layers", "page_bytes")
CODED_AXES = ("blocks", "slots", "slot_bytes")  # a slot each


class PageObjects(SealedObjects):
    """Pages are uint8 [blocks, layers, page_bytes], C-contiguous; or, where `slots` names their codec, coded blocks
    [blocks, 1, slot_bytes]. `serde` encodes pages; ``naive``, or the codec of the slots, stores them as they are.
    Others load PyTorch. `misfits` are reasons that say nothing of an object, where a peer says what it is to be."""

    def __init__(
        self,
        store: Store | str,
        *,
        namespace: Namespace,
        serde: str = "naive",
        slots: str = "naive",
        auth: AuthKey | None = None,
        misfits: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(store, namespace=namespace, auth=auth)
        if slots not in ("naive", serde):
            raise ConfigError(f"tiers below slots of {slots} must hold the same, got {serde}")
        self._serde = serde
        self._misfit_reasons = misfits
        self._in_place = serde == slots
        self._as_they_are = _AsTheyAre(slots)
        waits = self._in_place or is_coded(serde) or is_chunked(serde)  # for what `know_pages` tells
        self._codec: Any = None if waits else _Codec(serde)

    def know_pages(self, page_map: object, num_layers: int) -> None:
        """What lies where in pages, as `PageMap.as_json` tells it: to code them on the way to the store.
        ConfigError where they cannot be."""
        if self._codec is None and not self._in_place:
            made = _BlockCodec if is_coded(self._serde) else _ChunkCodec
            self._codec = made(self._serde, page_map, num_layers)

    def under(self, namespace: Namespace, version: str = "") -> "PageObjects":
        """The same under another namespace, in this `version`; its counters are these."""
        other = copy.copy(self)
        other.namespace = versioned(namespace, version)
        return other

    def save(
        self,
        key: str,
        pages: NDArray[np.uint8],
        *,
        first_token: int,
        end_token: int,
        confirm: Callable[[], bool] | None = None,
    ) -> bool:
        """As `ObjectCache.save_object`."""
        check_range(first_token, end_token)
        try:
            return self._put(key, pages, first_token, end_token, confirm)
        except ConfigError as error:  # of a codec, to which a number is none
            self._save_failed("unfit", key, error)
            return False

    def _put(
        self, key: str, pages: NDArray[np.uint8], first_token: int, end_token: int, confirm: Callable[[], bool] | None
    ) -> bool:
        return self.put_parts(
            key,
            lambda: self._encode(pages, end_token - first_token),
            kv_bytes=pages.nbytes,
            first_token=first_token,
            end_token=end_token,
            confirm=confirm,
        )

    def load(self, key: str, out: NDArray[np.uint8], *, first_token: int, end_token: int) -> bool:
        """Fill `out` with the object of these tokens under `key`. False on any miss; then `out` may hold anything."""
        check_range(first_token, end_token)
        tokens = (first_token, end_token)
        expected = Expected(self._as_they_are.axes, out.shape, "uint8", out.nbytes, tokens)
        if isinstance(self._codec, _BlockCodec | _ChunkCodec):
            expected = self._codec.expected(out, tokens)

        def decode(value: Found) -> bool:
            self._decode(value, key, out, expected)
            return True

        return bool(self.get_decoded(key, lambda: self._read(key, out), decode, misfits=self._misfit_reasons))

    def place(
        self,
        value: memoryview,
        key: str,
        shape: tuple[int, ...],
        *,
        first_token: int,
        end_token: int,
        is_sealed: bool = False,
    ) -> int | None:
        """At which byte of `value` the slots of this object begin, uint8 of `shape`, one after the other; None where it
        is not stored as slots are. FormatError where it is broken, or another object. `is_sealed` as in `opened`."""
        if not self._in_place:
            return None
        expected = Expected(self._as_they_are.axes, shape, "uint8", prod(shape), (first_token, end_token))
        part = self._as_they_are.part(self.opened(value, key, is_sealed=is_sealed), expected)
        return address(part.data) - address(value)

    def _encode(self, pages: NDArray[np.uint8], num_tokens: int) -> tuple[Mapping[str, Part], Mapping[str, str]]:
        return self._as_they_are.encode(pages) if self._in_place else self._codec.encode(pages, num_tokens)

    def _read(self, key: str, out: NDArray[np.uint8]) -> Found | None:
        """Pages as they are go to where they belong, behind a header of the usual length; others to memory that this
        thread's next read uses again, as filling fresh memory takes as long as a disk."""
        size = PAGE if self._in_place else out.nbytes + out.nbytes // 64 + HEADROOM_BYTES
        room = scratch("objects", size)
        pieces = [room[:PAGE], out.reshape(-1).data] if self._in_place else [room]
        try:
            length = self.store.get_pieces(key, pieces)
        except ValueTooLongError:
            return self.read_whole(key, out.nbytes)
        return None if length is None else cut(pieces, length)

    def _decode(self, value: Found, key: str, out: NDArray[np.uint8], expected: Expected) -> None:
        container = self.opened(value, key)
        if self._in_place:
            self._as_they_are.take(container, out, expected)
        elif not isinstance(value, bytes | bytearray | memoryview) and len(value) > 1:
            self._decode(b"".join(value), key, out, expected)  # its parts lie where the KV is to go
        else:
            self._codec.decode(container, out, expected)


class _AsTheyAre:
    """Slots stored byte by byte: pages as the naive serde has them, or the blocks of the codec that `slots` names."""

    def __init__(self, slots: str) -> None:
        self.serde = slots if slots == "naive" else f"{slots.partition(':')[0]}-blocks"
        self.axes = PAGE_AXES if slots == "naive" else CODED_AXES
        self._params = {} if slots == "naive" else {"codec": slots}

    def encode(self, pages: NDArray[np.uint8]) -> tuple[Mapping[str, Part], Mapping[str, str]]:
        part = Part("U8", pages.shape, pages.reshape(-1).data)
        return {"payload": part}, metadata_of(self.serde, pages.shape, "uint8", self.axes, self._params)

    def part(self, container: Container, expected: Expected) -> Part:
        """The one part that holds the slots."""
        said = stated(container.metadata, expected)
        if said.serde != self.serde or (self._params and said.params != self._params):
            told = f"{said.serde!r} {said.params}"
            raise FormatError(f"slots hold {self.serde!r} {self._params} here, the object {told}"[:300], reason="serde")
        part = container.parts.get("payload")
        if part is None or (part.dtype, part.shape, len(container.parts)) != ("U8", said.shape, 1):
            raise FormatError(f"slots must be one part of uint8{list(said.shape)}, got {sorted(container.parts)}"[:300])
        return part

    def take(self, container: Container, out: NDArray[np.uint8], expected: Expected) -> None:
        """Put the bytes into `out`, if they are not there already."""
        part = self.part(container, expected)
        if address(part.data) != out.ctypes.data:
            out.reshape(-1)[:] = np.frombuffer(part.data, np.uint8)


class _Codec:
    """A serde of tensors for pages."""

    def __init__(self, spec: str) -> None:
        from kvlab.serde import get_serde

        self._serde = get_serde(spec)
        self._serde.prepare()

    def encode(self, pages: NDArray[np.uint8], num_tokens: int) -> tuple[Mapping[str, Part], Mapping[str, str]]:
        import torch

        from kvlab.serde.wire import to_parts

        return to_parts(self._serde.encode(torch.from_numpy(pages), PAGE_AXES))

    def decode(self, container: Container, out: NDArray[np.uint8], expected: Expected) -> None:
        import torch

        from kvlab.serde import serde_to_read
        from kvlab.serde.wire import from_parts

        encoded = from_parts(container.parts, container.metadata, expected)
        serde = self._serde if encoded.serde == self._serde.name else serde_to_read(encoded.serde)
        into = torch.from_numpy(out)
        kv = serde.decode(encoded, into)
        if (tuple(kv.shape), kv.dtype) != (out.shape, torch.uint8):  # of another package's serde
            raise FormatError(f"serde {serde.name!r} decodes to {kv.dtype}{list(kv.shape)}", reason="serde")
        if kv is not into:
            into.copy_(kv)


class _BlockCodec:
    """Pages to coded blocks and back, for slots that hold pages as they are above tiers that do not."""

    def __init__(self, serde: str, page_map: object, num_layers: int) -> None:
        from kvlab.codecs.blocks import BlockCodec
        from kvlab.paged.typed import PageMap
        from kvlab.serde import get_serde

        self._blocks = BlockCodec(get_serde(serde), PageMap.of(page_map), num_layers)
        self.slot_bytes = self._blocks.slot_bytes
        self._stored = _AsTheyAre(serde)

    def expected(self, out: NDArray[np.uint8], tokens: tuple[int, int]) -> Expected:
        return Expected(CODED_AXES, (len(out), 1, self.slot_bytes), "uint8", out.nbytes, tokens)

    def encode(self, pages: NDArray[np.uint8], num_tokens: int) -> tuple[Mapping[str, Part], Mapping[str, str]]:
        coded = np.empty((len(pages), 1, self.slot_bytes), np.uint8)
        for block, slot in zip(pages, coded, strict=True):
            self._blocks.encode(_tensor(block), self._tokens_of(num_tokens), _tensor(slot[0]))
        return self._stored.encode(coded)

    def decode(self, container: Container, out: NDArray[np.uint8], expected: Expected) -> None:
        coded = np.empty((len(out), 1, self.slot_bytes), np.uint8)
        self._stored.take(container, coded, expected)
        assert expected.tokens is not None
        first_token, end_token = expected.tokens
        for block, slot in zip(out, coded, strict=True):
            self._blocks.decode(_tensor(slot[0]), self._tokens_of(end_token - first_token), _tensor(block))

    def _tokens_of(self, num_tokens: int) -> int:
        """Of each block in an object of so many tokens: one of less than a block fills its blocks in part."""
        return min(num_tokens, self._blocks.map.block_tokens)


class _ChunkCodec:
    """Whole chunks of pages, whose inside is known, by a serde that must tell K from V."""

    def __init__(self, spec: str, page_map: object, num_layers: int) -> None:
        from kvlab.codecs import PageCodec
        from kvlab.paged.typed import PageMap
        from kvlab.serde import get_serde

        self._map, self._layers = PageMap.of(page_map), num_layers
        serde = get_serde(spec)
        self._pages = PageCodec(serde, self._map)
        serde.prepare()

    def expected(self, out: NDArray[np.uint8], tokens: tuple[int, int]) -> Expected:
        from kvlab.geometry import AXES

        shape = self._map.shape(self._layers, tokens[1] - tokens[0])
        return Expected(AXES, shape, str(self._map.element).removeprefix("torch."), out.nbytes, tokens)

    def encode(self, pages: NDArray[np.uint8], num_tokens: int) -> tuple[Mapping[str, Part], Mapping[str, str]]:
        from kvlab.serde.wire import to_parts

        return to_parts(self._pages.encode(_tensor(pages), num_tokens))

    def decode(self, container: Container, out: NDArray[np.uint8], expected: Expected) -> None:
        from kvlab.serde.wire import from_parts

        encoded = from_parts(container.parts, container.metadata, expected)
        if encoded.serde != self._pages.serde.name:
            raise FormatError(
                f"chunks are {self._pages.serde.name!r} here, the object {encoded.serde!r}", reason="serde"
            )
        out[:] = 0  # what is none of the tokens'
        self._pages.decode(encoded, _tensor(out))


def _tensor(array: NDArray[np.uint8]) -> Any:
    import torch

    return torch.from_numpy(array)
