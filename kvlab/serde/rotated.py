"""`rotated4`: 4 bits after a rotation that makes every coordinate look Gaussian.

The strong 4-bit baseline of TurboQuant (arXiv 2504.19874) and QuIP (2307.13304): a random rotation spreads a
head's outlier channels over all of them, and what comes out is so nearly normal that one fixed table of 16 levels
(Lloyd and Max's for the normal distribution) fits every head of every model. No calibration, one scale a vector.

Sums are taken in an order that stands here, so that the bytes are the same on every CPU and GPU.
"""

import math

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.serde.base import Encoded, Serde, checked_out
from kvlab.serde.groups import checked_axes, need_kv_axes
from kvlab.serde.quantized import Shapes, checked_parts, finite, from_nibbles, nibbles
from kvlab.serde.sums import summed

# Levels of the 16-level minimum-error quantizer of N(0, 1); J. Max, "Quantizing for minimum distortion" (1960).
HALF_LEVELS = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
LEVELS = torch.tensor([-level for level in reversed(HALF_LEVELS)] + list(HALF_LEVELS))
MAX_HEAD_DIM = 1024
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2
LARGE, SMALL = 2.0**100, 2.0**-16  # numbers above are taken smaller, so that no sum of a thousand overflows


class Rotated4Serde(Serde):
    """One bf16 scale a token's head and 4 bits an element: 4.25 bits at head_dim 64, 4.125 at 128."""

    name = "rotated4"
    needs_kv_axes = True  # it takes head vectors apart, which an opaque page does not show
    takes_latents = True

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        need_kv_axes(self.name, kv, axes, latents=True)
        if (dim := kv.shape[axes.index("head_dim")]) > MAX_HEAD_DIM:
            raise ConfigError(f"rotated4 takes a head_dim of up to {MAX_HEAD_DIM}, got {dim}; use int4")
        vectors = kv.detach().cpu().movedim(axes.index("head_dim"), -1).float()
        if vectors.numel():
            finite(vectors.abs().amax())
        # The largest magnitude is taken out first, so that no square overflows.
        top = vectors.abs().amax(-1, keepdim=True) if dim else vectors.new_zeros(*vectors.shape[:-1], 1)
        unit = vectors / torch.where(top > 0, top, 1.0)
        root = (summed(unit.square(), -1) / max(dim, 1)).sqrt()
        scales = (root * top).clamp_(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
        small = torch.where(top > LARGE, SMALL, 1.0)
        inverse = 1 / (scales.float() * small)
        turned = transformed(vectors * small * signs(dim)) if dim else vectors
        codes = torch.bucketize(turned * torch.where(torch.isfinite(inverse), inverse, 0.0), BOUNDS).to(torch.uint8)
        parts = {"payload": nibbles(codes), "scales": scales}
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, parts)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        checked_axes(encoded.shape, encoded.axes, encoded.dtype, latents=True)
        at = encoded.axes.index("head_dim")
        checked_parts(self.name, encoded, part_shapes(encoded.shape, at))
        lead, dim = (*encoded.shape[:at], *encoded.shape[at + 1 :]), encoded.shape[at]
        if dim > MAX_HEAD_DIM:
            raise FormatError(f"head_dim must be up to {MAX_HEAD_DIM} for a rotation, got {dim}")
        result = checked_out(encoded, out)
        target = result.movedim(at, -1)
        if result.numel():
            limit, sign = torch.finfo(result.dtype).max, signs(dim)
            for index in range(lead[0]):
                levels = LEVELS[from_nibbles(encoded.parts["payload"][index], dim).int()]
                vectors = transformed(levels).mul_(sign).mul_(encoded.parts["scales"][index])
                target[index].copy_(vectors.clamp_(-limit, limit))
        return result


def part_shapes(shape: tuple[int, ...], at: int) -> Shapes:
    """Dtype and shape of each part of KV of this shape, whose axis `at` is head_dim."""
    lead, dim = (*shape[:at], *shape[at + 1 :]), shape[at]
    return {"payload": (torch.uint8, (*lead, -(-dim // 2))), "scales": (torch.bfloat16, (*lead, 1))}


def transformed(vectors: torch.Tensor) -> torch.Tensor:
    """Hadamard's orthogonal transform of each block of the last axis, which is its own inverse. Blocks are as large as
    the largest power of two in that axis (64 of 64, 16 of 80). Sums are those of two numbers, neighbours first."""
    block = block_of(vectors.shape[-1])
    vectors = vectors.contiguous()
    room = [torch.empty_like(vectors), torch.empty_like(vectors)]  # each in turn is read and filled
    for stage in range(block.bit_length() - 1):
        shape = (*vectors.shape[:-1], vectors.shape[-1] // (2 << stage), 2, 1 << stage)
        pairs, found = vectors.view(shape), room[stage % 2].view(shape)
        torch.add(pairs[..., 0, :], pairs[..., 1, :], out=found[..., 0, :])
        torch.sub(pairs[..., 0, :], pairs[..., 1, :], out=found[..., 1, :])
        vectors = room[stage % 2]
    return vectors * (1 / math.sqrt(block))


def block_of(dim: int) -> int:
    """Channels of a block: the largest power of two in `dim`."""
    return dim & -dim


def signs(dim: int) -> torch.Tensor:
    """1.0 or -1.0 for each channel, the same for ever."""
    return 1.0 - 2.0 * ((torch.arange(dim) * 0x9E3779B1 >> 13) & 1)
