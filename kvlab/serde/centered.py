"""`centered`: keys without what is known of them. For models whose keys carry a large constant.

Some models (Qwen 2 and 2.5) add a bias to K that is many times larger than what differs between tokens. RoPE turns it
with the position, so it fills the range of every scale, by token and by channel, and the codes are spent on it. Here
each key is turned back by its place in the chunk, and the mean of each channel is taken away; what is left is coded as
`int4` or `int8` codes it, and decoding adds and turns again. Turning by the place in the chunk is enough, and no
position need be known: what is left of the rotation is one turn for the whole chunk, which a mean takes with it.

A rotation and a mean are given back as they were taken, whatever they are: frequencies that are not the model's cost
quality and nothing else. They stand in the object.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde.base import Encoded, Serde, checked_out
from kvlab.serde.groups import checked_axes, need_kv_axes
from kvlab.serde.quantized import BATCH, Int4Serde, Int8Serde, ScaledSerde, checked_parts
from kvlab.serde.sums import summed

STYLES = ("half", "pairs")  # channel i turns with i + rotary / 2 (Llama, Qwen), or with its neighbour (GPT-J)
ROOM = 0.25  # what is coded is so much smaller: neither a turn nor a mean takes float32 to its end


class CenteredSerde(Serde):
    """``centered:theta=1000000,bits=8``: 4 or 8 bits an element, K by channel and V by token.

    `theta` is the base of the model's RoPE (``rope_theta`` of its config), `rotary` how many channels of a head turn
    (0: all), `style` how they are paired, `group` the elements of a group. `frequencies` are for ropes that are scaled:
    radians a token, one for each pair.
    """

    name = "centered"
    needs_kv_axes = True

    def __init__(
        self,
        bits: str | int = 4,
        theta: str | float = 10000.0,
        rotary: str | int = 0,
        style: str = "half",
        group: str | int = 64,
        frequencies: Sequence[float] | None = None,
    ) -> None:
        if str(bits) not in ("4", "8"):
            raise ConfigError(f"bits must be 4 or 8, got {str(bits)[:40]!r}")
        self.bits = int(bits)
        try:
            self.theta, self.rotary = float(theta), int(rotary)
        except ValueError:
            raise ConfigError(f"theta and rotary must be numbers, got {str((theta, rotary))[:80]}") from None
        if not 1 < self.theta < float("inf") or not 0 <= self.rotary <= 1 << 16 or self.rotary % 2:
            raise ConfigError(f"theta must be above 1 and rotary even, got {self.theta:g} and {self.rotary}")
        if style not in STYLES:
            raise ConfigError(f"style must be one of {', '.join(STYLES)}, got {style[:40]!r}")
        self.style, self._frequencies = style, frequencies
        self._inner = _inner(self.bits, group)

    @property
    def spec(self) -> str:
        about = f"bits={self.bits},theta={self.theta!r},rotary={self.rotary},style={self.style}"
        return f"{self.name}:{about},group={self._inner.group}"

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        need_kv_axes(self.name, kv, axes)
        host = kv.detach().cpu().permute([axes.index(axis) for axis in AXES])
        layers, _, heads, _, dim = host.shape
        frequencies = self.frequencies(dim)
        left, mean = torch.empty(host.shape), torch.empty(layers, heads, dim)
        for some in batches(host.shape):
            turned = rotated(host[some, ..., 0, :].double(), frequencies, self.style, -1.0) * ROOM
            mean[some] = centre(turned)
            left[some, ..., 0, :] = turned - mean[some].double()[:, None]
            left[some, ..., 1, :] = host[some, ..., 1, :].double() * ROOM
        inner = self._inner.encode(left, AXES)
        parts = {**inner.parts, "tables.mean": mean, "tables.frequencies": frequencies}
        params = {"bits": self.bits, "style": self.style, **inner.params}
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, parts, params)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        checked_axes(encoded.shape, encoded.axes, encoded.dtype)
        bits, style, frequencies = (
            encoded.params.get("bits"), encoded.params.get("style"), encoded.parts.get("tables.frequencies"),
        )  # fmt: skip
        if bits not in (4, 8) or type(bits) is not int or style not in STYLES:
            raise FormatError(f"centered KV needs bits and a style, got {str(dict(encoded.params))[:120]}")
        shape = tuple(encoded.shape[encoded.axes.index(axis)] for axis in AXES)
        layers, _, heads, _, dim = shape
        if frequencies is None or frequencies.dtype != torch.float32 or frequencies.dim() != 1:
            raise FormatError("centered part 'tables.frequencies' must be a list of float32")
        if 2 * len(frequencies) > dim:
            raise FormatError(f"{len(frequencies)} frequencies do not fit a head of {dim} channels")
        checked_parts(self.name, encoded, {"tables.mean": (torch.float32, (layers, heads, dim))})
        params = {key: value for key, value in encoded.params.items() if key not in ("bits", "style")}
        left = _inner(bits, 0).decode(Encoded(self.name, shape, "float32", AXES, encoded.parts, params))
        result = checked_out(encoded, out)
        target, limit = result.permute([encoded.axes.index(axis) for axis in AXES]), torch.finfo(result.dtype).max
        for some in batches(shape):
            keys = left[some, ..., 0, :].double() + encoded.parts["tables.mean"][some].double()[:, None]
            turned = rotated(keys, frequencies, style, 1.0)
            for kv, values in enumerate((turned, left[some, ..., 1, :].double())):
                target[some, ..., kv, :] = (values / ROOM).clamp_(-limit, limit)
        return result

    @property
    def inner(self) -> ScaledSerde:
        """What codes that which is left."""
        return self._inner

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians that each pair of channels turns a token, float32."""
        if self._frequencies is not None:
            given = torch.tensor(list(self._frequencies), dtype=torch.float32)
            if 2 * len(given) > head_dim:
                raise ConfigError(f"{len(given)} frequencies do not fit a head of {head_dim} channels")
            return given
        rotary = self.rotary or head_dim - head_dim % 2
        if not head_dim:
            return torch.empty(0)
        if rotary > head_dim:
            raise ConfigError(f"rotary must be at most head_dim, got {rotary} and {head_dim}")
        return rope_frequencies(rotary, self.theta)


def rope_frequencies(rotary: int, theta: float) -> torch.Tensor:
    """Radians that each pair of `rotary` channels turns a token, float32; RoPE as published (arXiv 2104.09864)."""
    return (theta ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))).float()


def rope_of(config: Any, head_dim: int) -> tuple[float, int]:
    """The base of a model's RoPE, and how many channels of a head turn, by its config as transformers has it."""
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if told and all(isinstance(value, dict) for value in told.values()):  # one for each kind of layer
        told = next(iter(told.values()))
    theta = told.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    share = told.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return float(theta), int(head_dim * share) // 2 * 2


def rotated(keys: torch.Tensor, frequencies: torch.Tensor, style: str, sign: float) -> torch.Tensor:
    """`keys` (..., tokens, kv_heads, head_dim), float64, turned forth (1) or back (-1) by their place in the chunk."""
    half = len(frequencies)
    cos, sin = (each[:, None] for each in turns(keys.shape[-3], frequencies, sign))
    out = keys.clone()
    first, second = (slice(0, half), slice(half, 2 * half)) if style == "half" else (
        slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    )  # fmt: skip
    a, b = keys[..., first], keys[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out


def turns(num_tokens: int, frequencies: torch.Tensor, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (tokens, pairs), float64, of a turn forth (1) or back (-1)."""
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies.double()
    return angles.cos(), angles.sin() * sign


def centre(turned: torch.Tensor) -> torch.Tensor:
    """The mean of each channel over the tokens of (..., tokens, kv_heads, head_dim)."""
    tokens = turned.shape[-3]
    return (summed(turned, -3).squeeze(-3) / max(tokens, 1)).add_(0.0)  # -0.0 is made 0.0


def batches(shape: Sequence[int]) -> list[slice]:
    """A few layers at a time, of typed KV with this shape: float64 is four times as large."""
    step = max(1, BATCH // max(prod(shape[1:]), 1))
    return [slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]


def constants(kv: torch.Tensor, axes: tuple[str, ...], frequencies: torch.Tensor, style: str = "half") -> list[float]:
    """Of each layer, how many times larger the constant of its keys is than what differs between tokens."""
    found = []
    for layer in kv.detach().cpu().permute([axes.index(axis) for axis in AXES]):
        turned = rotated(layer[..., 0, :].double(), frequencies, style, -1.0)
        mean = centre(turned)
        spread = (turned - mean).square().mean().sqrt().clamp_min(1e-30)
        found.append(float(mean.square().mean().sqrt() / spread))
    return found


def _inner(bits: int, group: str | int) -> ScaledSerde:
    return Int4Serde("channel", "token", group) if bits == 4 else Int8Serde("channel", "token", group)
