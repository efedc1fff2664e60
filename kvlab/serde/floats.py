"""A floating-point number as bits: its exponent, and the rest (sign and mantissa)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]  # unsigned integers as wide as the float


@dataclass(frozen=True)
class FloatFormat:
    """Widths of a float's fields: sign (1), `exponent_bits`, `mantissa_bits`; together 8, 16 or 32 bits."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def item_bytes(self) -> int:
        return (1 + self.exponent_bits + self.mantissa_bits) // 8

    @property
    def word(self) -> np.dtype[Any]:
        return np.dtype(f"u{self.item_bytes}")

    @property
    def rest_bits(self) -> int:
        return 1 + self.mantissa_bits

    def exponent(self, words: Words) -> NDArray[np.uint8]:
        """The exponent fields of `words`."""
        return ((words >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)).astype(np.uint8)

    def rest(self, words: Words) -> Words:
        """Sign and mantissa side by side, sign highest, in words of the same width."""
        bits = 8 * self.item_bytes
        kept = words & ((1 << self.mantissa_bits) - 1)
        kept |= (words >> (bits - 1)) << self.mantissa_bits
        return kept

    def join(self, exponent: NDArray[np.uint8], rest: Words, out: Words) -> None:
        """Put exponent and rest together again in `out`; `rest` is overwritten."""
        np.copyto(out, exponent)
        out <<= self.mantissa_bits
        out += rest
        # The sign stands at the exponent's lowest bit now; adding 2**(bits-1) - 2**mantissa carries it to the top.
        rest &= 1 << self.mantissa_bits
        rest *= (1 << (self.exponent_bits)) - 1
        out += rest


FORMATS = {
    "bfloat16": FloatFormat(8, 7),
    "float16": FloatFormat(5, 10),
    "float32": FloatFormat(8, 23),
    "float8_e4m3fn": FloatFormat(4, 3),
    "float8_e5m2": FloatFormat(5, 2),
}
