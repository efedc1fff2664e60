"""`rotated4`: 4 bits after a rotation that makes every coordinate look Gaussian.

The strong 4-bit baseline of TurboQuant (arXiv 2504.19874) and QuIP (2307.13304): a random rotation spreads a
head's outlier channels over all of them, and what comes out is so nearly normal that one fixed table of 16 levels
(Lloyd and Max's for the normal distribution) fits every head of every model. No calibration, one scale a vector.
"""

from functools import lru_cache

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.serde.base import Encoded, Serde, checked_out
from kvlab.serde.groups import checked_axes, need_kv_axes
from kvlab.serde.quantized import away_from_the_end, checked_parts, finite, from_nibbles, nibbles

# Levels of the 16-level minimum-error quantizer of N(0, 1); J. Max, "Quantizing for minimum distortion" (1960).
_HALF = (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326)
LEVELS = torch.tensor([-level for level in reversed(_HALF)] + list(_HALF))
MAX_HEAD_DIM = 1024  # a rotation of this takes 4 MiB, and a few are kept
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2


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
        root = unit.square().mean(-1, keepdim=True).sqrt() if dim else unit.new_zeros(*unit.shape[:-1], 1)
        scales = (root * top).clamp_(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
        small = away_from_the_end(top)
        inverse = 1 / (scales.float() * small)
        turned = vectors * small @ rotation(dim) if dim else vectors
        codes = torch.bucketize(turned * torch.where(torch.isfinite(inverse), inverse, 0.0), BOUNDS).to(torch.uint8)
        parts = {"payload": nibbles(codes), "scales": scales}
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, parts)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        checked_axes(encoded.shape, encoded.axes, encoded.dtype, latents=True)
        at = encoded.axes.index("head_dim")
        lead, dim = (*encoded.shape[:at], *encoded.shape[at + 1 :]), encoded.shape[at]
        shapes = {"payload": (torch.uint8, (*lead, -(-dim // 2))), "scales": (torch.bfloat16, (*lead, 1))}
        checked_parts(self.name, encoded, shapes)
        result = checked_out(encoded, out)
        target = result.movedim(at, -1)
        if result.numel():
            limit, turn = torch.finfo(result.dtype).max, rotation(dim).T.contiguous()
            for index in range(lead[0]):
                levels = LEVELS[from_nibbles(encoded.parts["payload"][index], dim).int()]
                vectors = (levels @ turn).mul_(encoded.parts["scales"][index])
                target[index].copy_(vectors.clamp_(-limit, limit))
        return result


@lru_cache(maxsize=8)
def rotation(dim: int) -> torch.Tensor:
    """An orthogonal (dim, dim) matrix, the same for ever: fixed signs, then Hadamard blocks.

    The blocks are as large as the largest power of two in `dim` (64 for 64, 16 for 80).
    """
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise FormatError(f"head_dim must be 1 to {MAX_HEAD_DIM} for a rotation, got {dim}")
    block = dim & -dim
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < block:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = 1.0 - 2.0 * ((torch.arange(dim) * 0x9E3779B1 >> 13) & 1)
    return signs[:, None] * torch.kron(torch.eye(dim // block), hadamard / block**0.5)
