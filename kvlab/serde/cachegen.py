"""`cachegen`: KV as an entropy-coded stream of distances from anchor tokens (CacheGen, arXiv 2310.07240).

As published, which is not what LMCache's file of that name does (see `cachegen_lmcache`): groups of ten tokens with
an 8-bit anchor; deltas in bins of 0.5, 1 and 1.5 in three groups of layers; one distribution per layer, K or V, and
channel, profiled once and kept beside the model. Choices the paper leaves open stand in `tables` and `anchors`; the
coder is rANS with 12-bit probabilities instead of arithmetic coding (same size, faster, and lanes for a GPU).
"""

from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde import rans
from kvlab.serde.anchors import GROUP, Anchors, anchor_codes, planes_of, residue
from kvlab.serde.base import Encoded, Serde, checked_out
from kvlab.serde.groups import checked_axes, need_kv_axes
from kvlab.serde.quantized import checked_parts, finite
from kvlab.serde.tables import Tables, load_tables

try:
    from kvlab.serde import rans_fast as coder
    from kvlab.serde.dequant_fast import dequantize
except ImportError:  # numba is an extra; the reference writes and reads the same bytes
    coder = rans  # type: ignore[misc]

    def dequantize(*_: object) -> bool:  # type: ignore[misc]
        return False


DELTA_CHANNELS, ANCHOR_CHANNELS = 8, 64  # channels of a lane: about 2,000 symbols of a 256-token chunk
__all__ = ["CacheGenSerde", "as_part", "coder", "planes_of_writable", "symbols_of"]

_LOADED: "WeakValueDictionary[str, Tables]" = WeakValueDictionary()


class CacheGenSerde(Serde):
    """Needs the model's tables: ``cachegen:tables=PATH,level=0.5``, or a digest of tables this process has loaded.

    An object names its table by digest and is read only by the serde that was given this table.
    """

    name = "cachegen"
    needs_kv_axes = True

    def __init__(self, tables: str | Tables | None = None, level: str | float = 1.0) -> None:
        if tables is None:
            raise ConfigError("cachegen needs tables=PATH of its model; make them with: kvlab profile MODEL TEXT")
        try:
            number = float(level)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise ConfigError(f"level must be a number like 0.5, got {str(level)[:40]!r}")
        if isinstance(tables, str):
            known = _LOADED.get(tables)
            if known is None and not _is_file(tables):
                raise ConfigError(
                    f"tables must be a file made by kvlab profile, or a digest in use; got {tables[:300]!r}"
                )
            tables = known or load_tables(tables, number)
        self.tables = _LOADED.setdefault(tables.digest, tables)  # a second copy would go, and take the entry along

    @property
    def spec(self) -> str:
        return f"{self.name}:tables={self.tables.digest},level={self.tables.level}"

    def prepare(self) -> None:
        planes, channels = self.tables.unit.shape
        heads = self.tables.kv_heads
        self.decode(self.encode(torch.zeros(planes // 2, GROUP + 1, heads, 2, channels // heads), AXES))

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        need_kv_axes(self.name, kv, axes)
        tables = self.tables
        planes = planes_of(kv.detach().cpu(), axes).float().contiguous()
        heads, dim = planes.shape[2:]
        if (planes.shape[0], heads * dim, heads) != (*tables.unit.shape, tables.kv_heads):
            found = f"{planes.shape[0] // 2} layers of {list(planes.shape[2:])}"
            raise ConfigError(f"these tables are for {_model_of(tables)}, the KV has {found}")
        if planes.numel():
            finite(planes.abs().amax())
        anchors = anchor_codes(planes) if tables.deltas else None
        bins = residue(planes, anchors).sub_(torch.from_numpy(tables.center)[:, None]).div_(tables.step).round_()
        outside = bins.abs() > tables.radius
        symbols = torch.where(outside, 2 * tables.radius + 1, bins + tables.radius).to(torch.uint8).numpy()
        words, lengths = coder.encode(symbols, tables.delta_model, rans.num_lanes(symbols.shape[2], DELTA_CHANNELS))
        escapes = bins[outside].clamp_(-32768, 32767).to(torch.int16)
        parts = {"payload.words": as_part(words), "payload.lengths": as_part(lengths), "payload.escapes": escapes}
        if anchors is not None:
            codes = anchors.codes.flatten(2).numpy()
            words, lengths = coder.encode(codes, tables.anchor_model, rans.num_lanes(codes.shape[2], ANCHOR_CHANNELS))
            parts |= {
                "anchors.words": as_part(words),
                "anchors.lengths": as_part(lengths),
                "anchors.scales": anchors.scales,
            }
        params = {"table": tables.digest}
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, parts, params)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        tables = self.tables
        checked_axes(encoded.shape, encoded.axes, encoded.dtype)
        if encoded.params.get("table") != tables.digest:
            asked = str(encoded.params.get("table"))[:40]
            raise FormatError(f"chunk needs cachegen table {asked!r}, this is {tables.digest}", reason="table")
        layers, tokens, heads, dim = (
            encoded.shape[encoded.axes.index(axis)] for axis in ("layers", "tokens", "kv_heads", "head_dim")
        )
        if (2 * layers, heads * dim, heads) != (*tables.unit.shape, tables.kv_heads):
            raise FormatError(
                f"chunk of {layers} layers of [{heads}, {dim}] does not fit tables for {_model_of(tables)}"
            )
        anchors = self._anchors(encoded, tokens, heads, dim) if tables.deltas else None
        steps = tokens - -(-tokens // GROUP) if tables.deltas else tokens
        symbols = symbols_of(encoded, "payload", tables.delta_model, steps)
        result = checked_out(encoded, out)
        self._dequantize(encoded, symbols, anchors, result)
        return result

    def _anchors(self, encoded: Encoded, tokens: int, heads: int, dim: int) -> Anchors:
        groups = -(-tokens // GROUP)
        shape = (len(self.tables.unit), groups, heads, 1)
        checked_parts(self.name, encoded, {"anchors.scales": (torch.bfloat16, shape)})
        codes = symbols_of(encoded, "anchors", self.tables.anchor_model, groups)
        return Anchors(codes.view(*codes.shape[:2], heads, dim), encoded.parts["anchors.scales"])

    def _dequantize(
        self, encoded: Encoded, symbols: torch.Tensor, anchors: Anchors | None, result: torch.Tensor
    ) -> None:
        """Write every plane of the result."""
        tables, taken = self.tables, 0
        escapes, escape = encoded.parts.get("payload.escapes"), 2 * tables.radius + 1
        if escapes is None or escapes.dtype != torch.int16 or escapes.ndim != 1:
            raise FormatError("cachegen part 'payload.escapes' must be a list of int16")
        step, center = tables.step, torch.from_numpy(tables.center)[:, None]
        num_escapes = np.count_nonzero(symbols.numpy() == escape, axis=(1, 2))
        if int(num_escapes.sum()) != len(escapes):
            raise FormatError(f"cachegen chunk holds {len(escapes)} escapes, its symbols name {int(num_escapes.sum())}")
        anchor_values = anchors.values() if anchors is not None else None
        base, group = (center, 0) if anchor_values is None else (anchor_values, GROUP)
        fast = (escapes.numpy(), tables.radius, step[:, 0].numpy(), base.numpy(), group)
        if dequantize(symbols.numpy(), *fast, ordered(result, encoded.axes)):
            return
        for index, plane in enumerate(planes_of_writable(result, encoded.axes)):
            values = symbols[index].float().sub_(tables.radius)
            if num_escapes[index]:
                values[symbols[index] == escape] = escapes[taken : taken + num_escapes[index]].float()
                taken += int(num_escapes[index])
            values.mul_(step[index])
            if anchor_values is None:
                _store(values.add_(center[index]), plane)
                continue
            # Whole groups first, in slices instead of a gather; then the last, shorter one.
            anchor, whole = anchor_values[index], len(plane) // GROUP
            grouped = plane[: whole * GROUP].view(whole, GROUP, *plane.shape[1:])
            _store(anchor[:whole, None], grouped[:, :1])
            nine = values[: whole * (GROUP - 1)].view(whole, GROUP - 1, values.shape[1])
            _store(nine.add_(anchor[:whole, None]), grouped[:, 1:])
            if len(plane) % GROUP:
                _store(anchor[whole:], plane[whole * GROUP :][:1])
                _store(values[whole * (GROUP - 1) :].add_(anchor[whole]), plane[whole * GROUP + 1 :])


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _store(values: torch.Tensor, target: torch.Tensor) -> None:
    """float32 (..., channels) into a view (..., kv_heads, head_dim); nothing becomes infinite on the way."""
    limit = torch.finfo(target.dtype).max
    if target.dtype == torch.float16:
        values = values.clamp(-limit, limit)
    target.copy_(values.reshape(target.shape))


def ordered(kv: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
    """A view (layers, kv, tokens, kv_heads, head_dim)."""
    return kv.permute([axes.index(axis) for axis in ("layers", "kv", "tokens", "kv_heads", "head_dim")])


def planes_of_writable(kv: torch.Tensor, axes: tuple[str, ...]) -> list[torch.Tensor]:
    """The planes of `kv`, each a view (tokens, kv_heads, head_dim) to write to."""
    return [plane for layer in ordered(kv, axes) for plane in layer]


def symbols_of(encoded: Encoded, stream: str, model: rans.Model, steps: int) -> torch.Tensor:
    """Symbols (planes, steps, channels) of the stream of words that is called `stream`."""
    arrays = []
    for name in (f"{stream}.words", f"{stream}.lengths"):
        part = encoded.parts.get(name)
        if part is None or part.dtype != torch.uint16:
            raise FormatError(f"cachegen part {name!r} must be uint16, got {None if part is None else part.dtype}")
        arrays.append(part.view(torch.int16).numpy().view(np.uint16))
    return torch.from_numpy(coder.decode(arrays[0], arrays[1], model, steps))


def as_part(words: "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]") -> torch.Tensor:
    return torch.from_numpy(words.view(np.int16)).view(torch.uint16)


def _model_of(tables: Tables) -> str:
    return f"{len(tables.unit) // 2} layers of [{tables.kv_heads}, {tables.unit.shape[1] // tables.kv_heads}]"
