"""CacheGen's groups of tokens: an anchor at 8 bits, the others as distances from it (arXiv 2310.07240, section 5.2)."""

from dataclasses import dataclass

import torch

GROUP = 10  # contiguous tokens; the first is the anchor, so that the others decode without waiting for each other


@dataclass(frozen=True)
class Anchors:
    """8-bit anchors: `codes` (planes, groups, kv_heads, head_dim) uint8 around 128, `scales` one bf16 a vector.

    The paper quantizes anchors "vector-wise"; the vector here is one head's, so that one head's outlier channel does
    not coarsen the others.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """The anchors as the decoder knows them, float32 (planes, groups, channels)."""
        limit = torch.finfo(torch.bfloat16).max  # a scale that was rounded up must not make infinity
        return ((self.codes.float() - 128) * self.scales.float()).clamp_(-limit, limit).flatten(2)


def planes_of(kv: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
    """A view (layers * 2, tokens, kv_heads, head_dim) if the axes allow one, else a copy; plane = 2 * layer + kv."""
    order = [axes.index(axis) for axis in ("layers", "kv", "tokens", "kv_heads", "head_dim")]
    return kv.permute(order).flatten(0, 1)


def anchor_codes(planes: torch.Tensor) -> Anchors:
    """The anchors of float32 (planes, tokens, kv_heads, head_dim)."""
    first = planes[:, ::GROUP]
    scales = (first.abs().amax(-1, keepdim=True) / 127).to(torch.bfloat16)
    inverse = 1 / scales.float()
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    codes = (first * inverse).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return Anchors(codes, scales)


def rest_of(num_tokens: int) -> torch.Tensor:
    """Indices of the tokens that are no anchors."""
    tokens = torch.arange(num_tokens)
    return tokens[tokens % GROUP != 0]


def residue(planes: torch.Tensor, anchors: Anchors | None) -> torch.Tensor:
    """What is quantized: each token's distance from its group's *decoded* anchor, so that no error adds up.

    Float32 (planes, tokens that are no anchors, channels); without anchors, the values of all tokens.
    """
    if anchors is None:
        return planes.flatten(2)
    rest = rest_of(planes.shape[1])
    return planes[:, rest].flatten(2) - anchors.values()[:, rest // GROUP]
