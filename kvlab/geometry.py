"""What one token's KV is.

Axis legend, used in every signature and docstring, always in this order::

    layers, tokens, kv_heads, kv, head_dim        kv: 0 = key, 1 = value
"""

from dataclasses import dataclass

from kvlab.errors import ConfigError

AXES = ("layers", "tokens", "kv_heads", "kv", "head_dim")
# Bytes of one stored element. fp8 caches hold one byte; their scales live with the weights, not in the cache.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1}


@dataclass(frozen=True)
class KVGeometry:
    """Shape of the KV that one token leaves in every layer of an attention model: (layers, 1, kv_heads, 2, head_dim).

    K and V have the same width here; models where they differ are served as opaque pages and sized by the calculator.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim
        counts of one model, over all ranks
    dtype
        torch's name without ``torch.``: ``bfloat16``, ``float16``, ``float32``, ``float8_e4m3fn``, ``float8_e5m2``

    Raises
    ------
    ConfigError
        where a count is no positive integer, or the dtype is unknown

    Examples
    --------
    >>> KVGeometry(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16").bytes_per_token
    23040
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}; got {self.dtype!r}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * DTYPE_BYTES[self.dtype]

    def shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """Shape of `num_tokens` tokens' KV: (layers, tokens, kv_heads, kv=2, head_dim)."""
        return (self.num_layers, num_tokens, self.num_kv_heads, 2, self.head_dim)
