"""What the `cachegen` kind learns of a model once and keeps beside it: steps and distributions per channel.

A file holds one set of tables per level (a level multiplies the paper's bin sizes: 1 is the paper's default, 0.5
halves every bin). A chunk names its table by digest. Made by ``kvlab profile MODEL TEXT``.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from kvlab.errors import ConfigError, FormatError
from kvlab.serde.anchors import GROUP, anchor_codes, planes_of, residue, rest_of
from kvlab.serde.rans import Model, normalized

FILE = "kvlab-cachegen.tables"  # in the form of safetensors; named so, vLLM would load it as weights
LEVELS = (0.0625, 0.125, 0.25, 0.5, 1.0)
BINS = (0.5, 1.0, 1.5)  # arXiv 2310.07240, section 5.2: three equal groups of layers, coarser as they get deeper
# Choices the paper leaves open. The unit of a bin is the standard deviation of a channel's deltas over the profiled
# text. A symbol is a whole number of bins up to RADIUS_UNITS deviations each side; beyond it, an escape and 16 bits.
RADIUS_UNITS = 5.0
MAX_RADIUS = 126
_ARRAYS = ("unit", "center", "delta_index", "delta_frequencies", "anchor_index", "anchor_frequencies")


@dataclass(frozen=True, eq=False)
class Tables:
    """One level's tables. Planes are (layer, kv), layer-major; channels are (kv_heads, head_dim).

    `unit` and `center` are float32 (planes, channels): spread and middle of what is quantized. `*_index` (planes,
    channels) int32 name rows of `*_frequencies` (tables, symbols) uint16. Without `deltas` values are quantized
    themselves, for comparison.
    """

    level: float
    bins: tuple[float, float, float]
    deltas: bool
    kv_heads: int
    unit: NDArray[np.float32]
    center: NDArray[np.float32]
    delta_index: NDArray[np.int32]
    delta_frequencies: NDArray[np.uint16]
    anchor_index: NDArray[np.int32]
    anchor_frequencies: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if self.unit.ndim != 2 or self.unit.shape[0] % 2 or self.unit.shape[1] % max(1, self.kv_heads):
            raise FormatError(f"tables must cover (2 * layers, heads * dim), got {list(self.unit.shape)}")
        if not (self.unit.shape == self.center.shape == self.delta_index.shape == self.anchor_index.shape):
            raise FormatError("the arrays of a table do not cover the same channels")
        if not (np.isfinite(self.unit).all() and (self.unit > 0).all() and np.isfinite(self.center).all()):
            raise FormatError("units of a table must be finite and above 0")
        object.__setattr__(self, "delta_model", Model.of(self.delta_index, self.delta_frequencies))
        object.__setattr__(self, "anchor_model", Model.of(self.anchor_index, self.anchor_frequencies))
        digest = blake2b(json.dumps(self._about(), sort_keys=True).encode(), digest_size=16)
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    digest: str = ""
    delta_model: Any = None
    anchor_model: Any = None

    def __repr__(self) -> str:
        planes, channels = self.unit.shape
        return f"Tables(level={self.level:g}, {planes // 2} layers, {channels} channels, digest {self.digest})"

    def _about(self) -> dict[str, Any]:
        return {"level": self.level, "bins": list(self.bins), "deltas": self.deltas, "kv_heads": self.kv_heads}

    @property
    def radius(self) -> int:
        """Symbols 0..2*radius are bins -radius..radius; the last one, 2*radius + 1, is the escape."""
        return int(self.delta_frequencies.shape[1]) // 2 - 1

    @property
    def step(self) -> torch.Tensor:
        """Bin width (planes, 1, channels), float32."""
        layers = len(self.unit) // 2
        factor = np.array([self.bins[3 * layer // layers] * self.level for layer in range(layers)], np.float32)
        return torch.from_numpy(self.unit * np.repeat(factor, 2)[:, None])[:, None]

    def nbytes(self) -> int:
        """Bytes of the distributions: what each chunk would carry if they lay in the chunk."""
        return self.delta_frequencies.nbytes + self.anchor_frequencies.nbytes


def profile(
    texts: Iterable[torch.Tensor],
    axes: tuple[str, ...],
    level: float = 1.0,
    *,
    bins: tuple[float, float, float] = BINS,
    deltas: bool = True,
    shared: bool = False,
) -> Tables:
    """Tables from the KV of some texts, each a chunk as the engine would cut it.

    `shared` makes one distribution for all channels (the paper's comparison), else one per layer, K or V, and channel.
    """
    chunks = [planes_of(kv, axes).float() for kv in texts if kv.shape[axes.index("tokens")]]
    if not chunks or not level > 0:
        raise ConfigError(f"profiling needs at least one text of at least one token and a level above 0, got {level}")
    kv_heads = next(iter(chunks)).shape[2]
    coded = [anchor_codes(chunk) if deltas else None for chunk in chunks]
    raw = torch.cat([residue(chunk, code) for chunk, code in zip(chunks, coded, strict=True)], dim=1)
    center = raw.mean(1) if not deltas else torch.zeros(raw.shape[0], raw.shape[2])
    spread = raw.var(1, correction=0).sqrt() if raw.shape[1] else torch.ones_like(center)
    unit = torch.where(spread > 1e-20, spread, 1e-20).numpy()
    radius = min(MAX_RADIUS, int(np.ceil(RADIUS_UNITS / (min(bins) * level))))
    planes, channels = unit.shape
    index = np.zeros((planes, channels), np.int32) if shared else np.arange(planes * channels, dtype=np.int32)
    index = index.reshape(planes, channels)
    empty = Tables(
        level,
        bins,
        deltas,
        kv_heads,
        unit,
        center.numpy(),
        index,
        _flat(index, 2 * radius + 2),
        index,
        _flat(index, 256),
    )
    bin_of = torch.round((raw - center[:, None]) / empty.step)
    symbols = torch.where(bin_of.abs() <= radius, bin_of + radius, 2 * radius + 1).numpy().astype(np.uint8)
    anchors = [code.codes.reshape(planes, -1, channels).numpy() for code in coded if code is not None]
    anchor_symbols = np.concatenate(anchors, axis=1) if anchors else np.zeros((planes, 0, channels), np.uint8)
    delta, anchor = _counted(symbols, index, 2 * radius + 2), _counted(anchor_symbols, index, 256)
    return Tables(level, bins, deltas, kv_heads, unit, center.numpy(), index, delta, index, anchor)


def save_tables(path: str | Path, tables: Iterable[Tables]) -> None:
    """One file with several levels."""
    tensors, about = {}, {}
    for one in tables:
        about[str(one.level)] = {**one._about(), "digest": one.digest}
        for name in _ARRAYS:
            tensors[f"{one.level}.{name}"] = torch.from_numpy(getattr(one, name).copy())
    save_file(tensors, str(path), metadata={"kvlab_cachegen": "1", "group": str(GROUP), "levels": json.dumps(about)})


def load_tables(path: str | Path, level: float) -> Tables:
    """The tables of `level` in a file; ConfigError if it has no such level, FormatError if it is broken."""
    try:
        with safe_open(str(path), framework="pt") as opened:
            fields = opened.metadata() or {}
            if fields.get("kvlab_cachegen") != "1" or fields.get("group") != str(GROUP):
                raise FormatError(f"{path} holds no cachegen tables of format 1")
            levels = json.loads(fields["levels"])
            if str(level) not in levels:
                raise ConfigError(f"{path} has levels {', '.join(levels)}, not {level}")
            about = levels[str(level)]
            arrays = {name: opened.get_tensor(f"{level}.{name}").numpy() for name in _ARRAYS}
        found = Tables(about["level"], tuple(about["bins"]), about["deltas"], about["kv_heads"], **arrays)
    except (FormatError, ConfigError, OSError):
        raise
    except Exception as error:  # safetensors raises its own class on broken files
        raise FormatError(f"{path} is not a readable table file: {error!r}"[:300]) from error
    if found.digest != about["digest"]:
        raise FormatError(f"{path} was changed: level {level} does not match its digest", reason="checksum")
    return found


def _flat(index: NDArray[np.int32], symbols: int) -> NDArray[np.uint16]:
    return normalized(np.zeros((int(index.max(initial=0)) + 1, symbols)))


def _counted(symbols: NDArray[np.uint8], index: NDArray[np.int32], num_symbols: int) -> NDArray[np.uint16]:
    """Frequencies of (planes, steps, channels) symbols under their tables."""
    tables = int(index.max(initial=0)) + 1
    flat = index[:, None].astype(np.int64) * num_symbols + symbols
    counts = np.bincount(flat.reshape(-1), minlength=tables * num_symbols)
    return normalized(counts.reshape(tables, num_symbols))


__all__ = ["BINS", "FILE", "LEVELS", "Tables", "load_tables", "profile", "rest_of", "save_tables"]
