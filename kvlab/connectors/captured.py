"""KV caught from a model: kept per layer, saved as one safetensors file, compared, encoded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TypeAlias

import torch

from kvlab.connectors.tensor_file import opened, write_file
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES

FORMAT = "3"  # 2: windows; 3: recurrent states

States: TypeAlias = tuple[tuple[torch.Tensor, ...], ...]  # of each recurrent layer, the tensors of its state


@dataclass(frozen=True)
class KV:
    """The KV of one text in every layer of a model.

    `keys` and `values` hold one tensor per layer, axes (tokens, kv_heads, head_dim), keys as the cache holds them
    (after rotary embedding). Layers of a pruned cache may hold different numbers of tokens; `num_positions` says
    how many tokens the model had read, which is the position of the next one. `windows` names, for each layer whose
    cache keeps only the latest tokens, how many its attention sees; None elsewhere, empty where no layer has one.

    A recurrent layer keeps no KV of each token but one state of all tokens so far. `states` holds, by the number of
    tokens behind which it was taken, the state of each such layer, as the engine keeps it: ``kv.states[300][0]`` are
    the tensors of the first one's behind 300 tokens. `keys` and `values` are of the layers that attend, which may be
    none.

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
    states: Mapping[int, States] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kinds(self.keys, self.values, self.model, self.states)
        if len(self.keys) != len(self.values) or not (self.keys or self.states):
            raise ConfigError(f"KV needs keys and values of every layer, got {len(self.keys)} and {len(self.values)}")
        if not _is_count(self.num_positions) or not all(map(_is_count, self.token_ids)):
            raise ConfigError(
                f"num_positions and token_ids must be whole numbers from 0 on, got {self.num_positions!r} and "
                f"{next((token for token in self.token_ids if not _is_count(token)), 'fit ids')!r}"
            )
        if self.windows and len(self.windows) != len(self.keys):
            raise ConfigError(f"windows must name all {len(self.keys)} layers or none, got {len(self.windows)}")
        if (
            any(not 0 < end <= self.num_positions for end in self.states)
            or len(set(map(len, self.states.values()))) > 1
        ):
            raise ConfigError(
                f"states must be of the same layers, each behind 1 to {self.num_positions} tokens; "
                f"got {', '.join(f'{len(held)} layers behind {end}' for end, held in self.states.items())}"
            )
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key.ndim != 3 or key.shape[:2] != value.shape[:2]:
                shapes = f"{list(key.shape)} and {list(value.shape)}"
                raise ConfigError(f"K and V of layer {index} must be (tokens, kv_heads, head_dim), got {shapes}")

    def __repr__(self) -> str:
        held = []
        if self.keys:
            tokens, key = sorted({len(key) for key in self.keys}), self.keys[0]
            count = f"{tokens[0]}" if len(tokens) == 1 else f"{tokens[0]} to {tokens[-1]}"
            shape = f"{self.num_layers} layers x {count} tokens x {key.shape[1]} KV heads x {key.shape[2]}"
            held.append(f"{shape}, {str(key.dtype).removeprefix('torch.')}")
        if self.states:
            ends = " and ".join(map(str, sorted(self.states)))
            held.append(f"states of {len(next(iter(self.states.values())))} layers behind {ends} tokens")
        return f"KV({self.model!r}, {', '.join(held)}, {self.num_bytes:,} bytes)"

    @property
    def num_layers(self) -> int:
        """Layers that attend."""
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        states = (tensor for layers in self.states.values() for parts in layers for tensor in parts)
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values, *states))

    def tensor(self) -> torch.Tensor:
        """All of it as one tensor (layers, tokens, kv_heads, kv, head_dim), which is what a serde takes."""
        if self.states:
            raise ConfigError(
                "KV with recurrent states is no tensor of tokens, and a store of these would lose them; use `save`"
            )
        if len({tensor.shape for tensor in (*self.keys, *self.values)}) > 1:
            raise ConfigError("layers hold different shapes; encode keys[i] and values[i] one by one")
        return torch.stack([torch.stack(pair, dim=2) for pair in zip(self.keys, self.values, strict=True)])

    def replaced(self, tensor: torch.Tensor) -> "KV":
        """The same text with other KV, given as `tensor` gives it: a decoded copy, say."""
        if tensor.ndim != len(AXES) or tensor.shape[3] != 2:
            raise ConfigError(f"KV must have axes {', '.join(AXES)}, got shape {list(tensor.shape)}")
        keys, values = tensor.unbind(dim=3)
        return replace(self, keys=tuple(keys), values=tuple(values))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: ``layers.N.key`` and ``layers.N.value``, ``states.TOKENS.N.PART`` of
        recurrent layers, the rest in its metadata. ConfigError where `path` cannot be written or is no regular file."""
        write_file(path, *self.file_parts())

    def file_parts(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save` writes: tensors by name, and the fields of the metadata."""
        tensors = {
            f"states.{end}.{index}.{part}": tensor.detach().cpu().clone()
            for end, layers in self.states.items()
            for index, parts in enumerate(layers)
            for part, tensor in enumerate(parts)
        }
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"layers.{index}.key"] = key.detach().cpu().contiguous()
            tensors[f"layers.{index}.value"] = value.detach().cpu().contiguous()
        about = {
            "num_layers": self.num_layers,
            "num_positions": self.num_positions,
            "token_ids": list(self.token_ids),
            "windows": list(self.windows),
            "states": {end: [len(parts) for parts in layers] for end, layers in self.states.items()},
        }
        fields = {
            "kvlab_kv": FORMAT,
            "axes": "tokens,kv_heads,head_dim",
            "model": self.model,
            "about": json.dumps(about),
        }
        return tensors, fields

    @staticmethod
    def load(path: str | Path) -> "KV":
        """Read what `save` wrote; FormatError if it is something else, ConfigError if it is no regular file."""
        with opened(path) as (file, fields):
            if fields.get("kvlab_kv") != FORMAT:
                raise FormatError(f"{path} is no KV of format {FORMAT}: it says {fields.get('kvlab_kv')!r}")
            about = json.loads(fields["about"])
            layers = range(about["num_layers"])
            keys, values = (
                tuple(file.get_tensor(f"layers.{index}.{half}") for index in layers) for half in ("key", "value")
            )
            states = {
                int(end): tuple(
                    tuple(file.get_tensor(f"states.{end}.{index}.{part}") for part in range(count))
                    for index, count in enumerate(counts)
                )
                for end, counts in about["states"].items()
            }
            token_ids, windows = tuple(about["token_ids"]), tuple(about["windows"])
            return KV(keys, values, token_ids, about["num_positions"], fields.get("model", ""), windows, states)

    def diff(self, other: "KV") -> dict[str, torch.Tensor]:
        """How far `other` lies from this: relative L2 error, float64, ``{"key": (layers, kv_heads), "value": ...}``,
        and ``"state"`` where there are recurrent layers: (numbers of tokens, ascending; layers).

        0 means equal; a head or state that is all zero here and not in `other` gives infinity.
        """
        if not isinstance(other, KV):
            raise ConfigError(f"KV is compared with KV, as `read` and `capture` give it, got {type(other).__name__}")
        ours, theirs = ([tuple(tensor.shape) for tensor in (*kv.keys, *kv.values)] for kv in (self, other))
        if ours != theirs:
            first, second = (f"{shapes[:1]} x {len(shapes)}" for shapes in (ours, theirs))
            raise ConfigError(f"KV of shapes {first} and {second} cannot be compared")
        found = {}
        if self.keys:
            found["key"] = torch.stack([_error(a, b) for a, b in zip(self.keys, other.keys, strict=True)])
            found["value"] = torch.stack([_error(a, b) for a, b in zip(self.values, other.values, strict=True)])
        if self.states or other.states:
            held, wanted = (
                {end: [[tuple(part.shape) for part in parts] for parts in layers] for end, layers in kv.states.items()}
                for kv in (self, other)
            )
            if held != wanted:
                raise ConfigError(
                    f"states behind {sorted(held)} and {sorted(wanted)} tokens, or of other shapes, cannot be compared"
                )
            found["state"] = torch.stack(
                [
                    torch.stack([_error(_flat(a), _flat(b))[0] for a, b in zip(layers, other.states[end], strict=True)])
                    for end, layers in sorted(self.states.items())
                ]
            )
        return found


def _check_kinds(keys: object, values: object, model: object, states: object) -> None:
    """ConfigError unless each part of a KV is of the kind that it must be."""
    for name, layers in (("keys", keys), ("values", values)):
        if not isinstance(layers, tuple | list):
            raise ConfigError(f"{name} must be a tensor for each layer, got {_kind(layers)}")
        for index, layer in enumerate(layers):
            _check_tensor(layer, f"{name}[{index}]")
    if not isinstance(model, str) or not isinstance(states, Mapping):
        raise ConfigError(
            f"model must be text and states a mapping from numbers of tokens, got {_kind(model)} and {_kind(states)}"
        )
    for end, held in states.items():
        for part in (part for parts in held for part in parts):
            _check_tensor(part, f"states[{end}]")


def _check_tensor(layer: object, name: str) -> None:
    """ConfigError unless `layer` is a tensor that holds its numbers one by one."""
    if not isinstance(layer, torch.Tensor):
        raise ConfigError(f"{name} must be a tensor, got {_kind(layer)}")
    if layer.layout != torch.strided or layer.is_quantized or layer.is_meta:
        what = "of the meta device" if layer.is_meta else "quantized" if layer.is_quantized else str(layer.layout)
        raise ConfigError(f"{name} must be a dense tensor with its numbers, got one that is {what}")


def _kind(value: object) -> str:
    return type(value).__name__


def _is_count(number: object) -> bool:
    return not isinstance(number, bool) and isinstance(number, Integral) and int(number) >= 0


def _flat(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A layer's state as (1, 1, numbers)."""
    return torch.cat([part.double().flatten() for part in parts])[None, None]


def _error(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Relative L2 error per head of two (tokens, kv_heads, head_dim) tensors."""
    a, b = reference.double(), other.to(reference.device).double()
    distance = (a - b).square().sum(dim=(0, 2)).sqrt()
    norm = a.square().sum(dim=(0, 2)).sqrt()
    return torch.where(distance == 0, torch.zeros_like(distance), distance / norm)
