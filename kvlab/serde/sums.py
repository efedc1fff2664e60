"""Sums in an order that stands here: a GPU's, and every CPU's, have the same bits."""

import torch


def summed(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums over `dim`, which stays with size 1. The upper half is added to the lower one until one number is left;
    behind the end are zeros, up to a power of two."""
    length = values.shape[dim]
    whole = 1 << max(length - 1, 0).bit_length()
    if whole > length:
        shape = list(values.shape)
        shape[dim] = whole - length
        values = torch.cat([values, values.new_zeros(shape)], dim)
    while (half := values.shape[dim] // 2) > 0:
        values = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
    return values
