"""Encoded objects between an engine's pages on a GPU and host memory, through a ring of GPU buffers.

A save gathers and encodes in one pass into a buffer of the ring, and one DMA takes it to the host; a load is the same
backwards. No other copy of the objects is made on the GPU: a ring buffer holds a few of them, encoded. Objects of as
many tokens go together, as a launch costs as much as some MiB. On a CPU (Triton's interpreter) the same calls run one
after the other.

A stream of its own encodes, as a save of plain pages gathers (`kvlab.paged.cuda`): the pages must stay as they are
until `Saving.gathered`. A load's pages are filled before the current stream's next work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlab.codecs.lossless import LosslessCodec
from kvlab.codecs.plan import Plan, num_tokens_of
from kvlab.codecs.rotated import RotatedCodec
from kvlab.codecs.scaled import ScaledCodec
from kvlab.errors import ConfigError, FormatError
from kvlab.serde.base import Encoded

RING_DEPTH = 4
Codec = ScaledCodec | RotatedCodec | LosslessCodec
ESCAPES = "payload.escapes"


@dataclass
class Saving:
    """Objects on their way to host memory. `gathered`: from then on their pages may change; `ended`: they are there."""

    plan: Plan
    buffer: torch.Tensor
    flags: torch.Tensor
    gathered: Any = None
    ended: Any = None

    def encoded(self) -> list[Encoded | None]:
        """The objects, over the host buffer; None where one is none of this codec's: a number is NaN or infinite, or
        exponents are wilder than there is room for. Waits until they are there."""
        if self.ended is not None:
            self.ended.synchronize()
        found: list[Encoded | None] = []
        for at, (odd, num_escapes) in enumerate(self.flags.tolist()):
            plan = self.plan.shortened(ESCAPES, num_escapes) if ESCAPES in self.plan.parts and not odd else self.plan
            found.append(None if odd else plan.encoded(self.buffer[at * self.plan.num_bytes :]))
        return found


@dataclass
class Loading:
    """Objects on their way to pages."""

    flags: torch.Tensor
    ended: Any = None

    def whole(self) -> list[bool]:
        """Of each object, whether the pages hold it; False where its bytes do not fit each other, and nothing of it was
        written. Waits until they are there."""
        if self.ended is not None:
            self.ended.synchronize()
        return [not odd for odd in self.flags[:, 0].tolist()]


class Staging:
    """Saves and loads objects with one codec, through `depth` buffers of `buffer_bytes`. One thread at a time."""

    def __init__(self, codec: Codec, device: torch.device, buffer_bytes: int, depth: int = RING_DEPTH) -> None:
        self.codec, self.device, self.buffer_bytes = codec, device, buffer_bytes
        self._on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(depth)]
        self._at = 0
        if self._on_gpu:
            self._pack, self._out, self._in = (torch.cuda.Stream(device) for _ in range(3))
            self._free = [torch.cuda.Event() for _ in range(depth)]

    def room(self, num_tokens: int) -> int:
        """How many objects of so many tokens go together; ConfigError where not one does."""
        each = self.codec.plan(num_tokens).num_bytes
        if each > self.buffer_bytes:
            raise ConfigError(
                f"an object of {num_tokens} tokens takes {each} bytes as {self.codec.name}, a staging buffer has "
                f"{self.buffer_bytes}; give more GPU memory for staging, or take smaller chunks"
            )
        return self.buffer_bytes // each

    def prepare(self) -> None:
        """Compile all programs: block 0 goes out, comes back, and is put as it was. Before the engine serves."""
        pages = self.codec.pages
        raw = [layer[0].clone() for layer in pages.layout.pages]
        plan = self.codec.plan(pages.map.block_tokens)
        host = torch.empty(plan.num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        self.save([[0]], pages.map.block_tokens, host).encoded()
        self.load([plan.encoded(host)], [[0]]).whole()  # whatever it holds: block 0 need hold no numbers
        for layer, page in zip(pages.layout.pages, raw, strict=True):
            layer[0] = page

    def save(self, objects: Sequence[Sequence[int]], num_tokens: int, host: torch.Tensor) -> Saving:
        """Pages of objects of so many tokens each, as they are behind the current stream's work so far, into `host`:
        pinned uint8 of at least ``codec.plan(num_tokens).num_bytes`` for each. At most `room`. Returns at once."""
        plan = self._plan(objects, num_tokens)
        at, size = self._next(), len(objects) * plan.num_bytes
        buffer = self._buffers[at][:size]
        told = torch.zeros((len(objects), 2), dtype=torch.int32, pin_memory=self._on_gpu)
        if not self._on_gpu:
            self.codec.encode(objects, num_tokens, buffer, told)
            host[:size].copy_(buffer)
            return Saving(plan, host, told)
        self._pack.wait_stream(torch.cuda.current_stream(self.device))
        self._pack.wait_event(self._free[at])
        with torch.cuda.stream(self._pack):
            flags = torch.zeros((len(objects), 2), dtype=torch.int32, device=self.device)
            self.codec.encode(objects, num_tokens, buffer, flags)
            told.copy_(flags, non_blocking=True)
            gathered = _recorded(self._pack)
        self._out.wait_event(gathered)
        with torch.cuda.stream(self._out):
            host[:size].copy_(buffer, non_blocking=True)
            self._free[at].record(self._out)
            ended = _recorded(self._out)
        return Saving(plan, host, told, gathered, ended)

    def load(self, encoded: Sequence[Encoded], objects: Sequence[Sequence[int]]) -> Loading:
        """Objects of as many tokens each, whose parts stay in host memory until the load has ended, into pages: the
        current stream's next work sees them. At most `room`. Returns at once; FormatError, and nothing is begun, where
        parts do not fit."""
        for one in encoded:
            self.codec.check(one)
        num_tokens = num_tokens_of(encoded[0])
        plan = self._plan(objects, num_tokens)
        if len(encoded) != len(objects) or any(one.shape != plan.shape for one in encoded):
            raise FormatError(f"objects that are loaded together must be {list(plan.shape)}", reason="wrong_shape")
        escapes = [one.parts[ESCAPES].numel() for one in encoded if ESCAPES in plan.parts]
        if max(escapes, default=0) > (plan.parts[ESCAPES].shape[0] if escapes else 0):
            raise FormatError(f"{max(escapes)} escapes are more than a staging buffer has room for", reason="too_large")
        at, size = self._next(), len(objects) * plan.num_bytes
        buffer = self._buffers[at][:size]
        told = torch.zeros((len(objects), 2), dtype=torch.int32, pin_memory=self._on_gpu)
        if not self._on_gpu:
            self._fill(plan, buffer, encoded)
            self._decode(buffer, objects, num_tokens, escapes, told)
            return Loading(told)
        compute = torch.cuda.current_stream(self.device)
        self._in.wait_event(self._free[at])
        with torch.cuda.stream(self._in):
            self._fill(plan, buffer, encoded)
        compute.wait_stream(self._in)
        flags = torch.zeros((len(objects), 2), dtype=torch.int32, device=self.device)
        self._decode(buffer, objects, num_tokens, escapes, flags)
        self._free[at].record(compute)
        told.copy_(flags, non_blocking=True)
        return Loading(told, _recorded(compute))

    def _plan(self, objects: Sequence[Sequence[int]], num_tokens: int) -> Plan:
        if not 1 <= len(objects) <= self.room(num_tokens):
            raise ConfigError(f"1 to {self.room(num_tokens)} objects go together, got {len(objects)}")
        return self.codec.plan(num_tokens)

    def _decode(
        self,
        buffer: torch.Tensor,
        objects: Sequence[Sequence[int]],
        num_tokens: int,
        escapes: Sequence[int],
        flags: torch.Tensor,
    ) -> None:
        if isinstance(self.codec, LosslessCodec):
            self.codec.decode(buffer, objects, num_tokens, escapes, flags)
        else:
            self.codec.decode(buffer, objects, num_tokens)

    def _fill(self, plan: Plan, buffer: torch.Tensor, encoded: Sequence[Encoded]) -> None:
        """One copy for all where they lie in host memory as they do here, else one for each part."""
        run = _one_run(plan, encoded)
        if run is not None:
            buffer.copy_(run, non_blocking=True)
            return
        for at, one in enumerate(encoded):
            there = buffer[at * plan.num_bytes :]
            for name, part in plan.parts.items():
                flat = one.parts[name].reshape(-1).view(torch.uint8)
                start = part.start
                there[start : start + flat.numel()].copy_(flat, non_blocking=True)

    def _next(self) -> int:
        self._at = (self._at + 1) % len(self._buffers)
        return self._at


def _one_run(plan: Plan, encoded: Sequence[Encoded]) -> torch.Tensor | None:
    """The host memory of all objects, where their parts lie in it as `plan` has them."""
    first = next(encoded[0].parts[name] for name, part in plan.parts.items() if part.start == 0)
    begin, size = first.data_ptr(), len(encoded) * plan.num_bytes
    for at, one in enumerate(encoded):
        for name, part in plan.parts.items():
            if one.parts[name].numel() and one.parts[name].data_ptr() != begin + at * plan.num_bytes + part.start:
                return None
    storage = first.untyped_storage()
    start = begin - storage.data_ptr()
    if start + size > storage.nbytes():
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (size,), (1,))


def _recorded(stream: Any) -> Any:
    """The end of what `stream` has been given; a thread that waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
