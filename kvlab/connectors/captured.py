"""KV caught from a model: kept per layer, saved as one safetensors file, compared, encoded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES

FORMAT = "2"  # 2: windows


@dataclass(frozen=True)
class KV:
    """The KV of one text in every layer of a model.

    `keys` and `values` hold one tensor per layer, axes (tokens, kv_heads, head_dim), keys as the cache holds them
    (after rotary embedding). Layers of a pruned cache may hold different numbers of tokens; `num_positions` says
    how many tokens the model had read, which is the position of the next one. `windows` names, for each layer whose
    cache keeps only the latest tokens, how many its attention sees; None elsewhere, empty where no layer has one.

    A captured KV is what the model left and cannot be written to. To try an edit, change a copy::

        changed = kv.tensor().clone()  # (layers, tokens, kv_heads, kv, head_dim)
        changed[0, 5] = 0
        edited = kv.replaced(changed)
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    token_ids: tuple[int, ...]
    num_positions: int
    model: str = ""
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values) or not self.keys:
            raise ConfigError(f"KV needs keys and values of every layer, got {len(self.keys)} and {len(self.values)}")
        if self.windows and len(self.windows) != len(self.keys):
            raise ConfigError(f"windows must name all {len(self.keys)} layers or none, got {len(self.windows)}")
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key.ndim != 3 or key.shape[:2] != value.shape[:2]:
                shapes = f"{list(key.shape)} and {list(value.shape)}"
                raise ConfigError(f"K and V of layer {index} must be (tokens, kv_heads, head_dim), got {shapes}")

    def __repr__(self) -> str:
        tokens = sorted({len(key) for key in self.keys})
        held = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
        key = self.keys[0]
        shape = f"{self.num_layers} layers x {held} tokens x {key.shape[1]} KV heads x {key.shape[2]}"
        return f"KV({self.model!r}, {shape}, {str(key.dtype).removeprefix('torch.')}, {self.num_bytes:,} bytes)"

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def tensor(self) -> torch.Tensor:
        """All of it as one tensor (layers, tokens, kv_heads, kv, head_dim), which is what a serde takes."""
        if len({tensor.shape for tensor in (*self.keys, *self.values)}) > 1:
            raise ConfigError("layers hold different shapes; encode keys[i] and values[i] one by one")
        return torch.stack([torch.stack(pair, dim=2) for pair in zip(self.keys, self.values, strict=True)])

    def replaced(self, tensor: torch.Tensor) -> "KV":
        """The same text with other KV, given as `tensor` gives it: a decoded copy, say."""
        if tensor.ndim != len(AXES) or tensor.shape[3] != 2:
            raise ConfigError(f"KV must have axes {', '.join(AXES)}, got shape {list(tensor.shape)}")
        keys, values = tensor.unbind(dim=3)
        return KV(tuple(keys), tuple(values), self.token_ids, self.num_positions, self.model, self.windows)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: ``layers.N.key`` and ``layers.N.value``, the rest in its metadata."""
        tensors = {}
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"layers.{index}.key"] = key.detach().cpu().contiguous()
            tensors[f"layers.{index}.value"] = value.detach().cpu().contiguous()
        about = {
            "num_layers": self.num_layers,
            "num_positions": self.num_positions,
            "token_ids": list(self.token_ids),
            "windows": list(self.windows),
        }
        fields = {
            "kvlab_kv": FORMAT,
            "axes": "tokens,kv_heads,head_dim",
            "model": self.model,
            "about": json.dumps(about),
        }
        save_file(tensors, str(path), metadata=fields)

    @staticmethod
    def load(path: str | Path) -> "KV":
        """Read what `save` wrote; FormatError if it is something else."""
        with opened(path) as (file, fields):
            if fields.get("kvlab_kv") != FORMAT:
                raise FormatError(f"{path} is no KV of format {FORMAT}: it says {fields.get('kvlab_kv')!r}")
            about = json.loads(fields["about"])
            layers = range(about["num_layers"])
            keys, values = (
                tuple(file.get_tensor(f"layers.{index}.{half}") for index in layers) for half in ("key", "value")
            )
            token_ids, windows = tuple(about["token_ids"]), tuple(about["windows"])
            return KV(keys, values, token_ids, about["num_positions"], fields.get("model", ""), windows)

    def diff(self, other: "KV") -> dict[str, torch.Tensor]:
        """How far `other` lies from this: relative L2 error, ``{"key": (layers, kv_heads), "value": ...}``, float64.

        0 means equal; a head that is all zero here and not in `other` gives infinity.
        """
        ours, theirs = ([tuple(tensor.shape) for tensor in (*kv.keys, *kv.values)] for kv in (self, other))
        if ours != theirs:
            raise ConfigError(
                f"KV of shapes {ours[0]} x {len(ours)} and {theirs[0]} x {len(theirs)} cannot be compared"
            )
        return {
            "key": torch.stack([_error(a, b) for a, b in zip(self.keys, other.keys, strict=True)]),
            "value": torch.stack([_error(a, b) for a, b in zip(self.values, other.values, strict=True)]),
        }


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file and its metadata. What goes wrong with its content, within the block too, is a FormatError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file, file.metadata() or {}
    except (FormatError, OSError):
        raise
    except Exception as error:  # safetensors raises its own class on broken files
        raise FormatError(f"{path} is not a readable file of KV: {error!r}"[:300]) from error


def _error(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Relative L2 error per head of two (tokens, kv_heads, head_dim) tensors."""
    a, b = reference.double(), other.to(reference.device).double()
    distance = (a - b).square().sum(dim=(0, 2)).sqrt()
    norm = a.square().sum(dim=(0, 2)).sqrt()
    return torch.where(distance == 0, torch.zeros_like(distance), distance / norm)
