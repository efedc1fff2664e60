"""What every transform of KV promises, as tests. Subclass, say how to make yours, inherit the tests::

class TestMyTransform(TransformTests):
    def transform(self):
        return MyTransform()
"""

from itertools import product
from typing import ClassVar

import torch

from kvlab.testing.wanted import to_define
from kvlab.transforms import KVTransform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (1, 7, 32)  # of an object's last block, and of a whole one


class TransformTests:
    """The suite. `transform` makes a new one each time."""

    max_error: ClassVar[float] = float("inf")  # relative L2 error of what comes back, in float32

    def transform(self) -> KVTransform:
        """A new transform."""
        raise to_define(self, "transform(self)", "a new transform")

    def kv(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """KV of two layers, (layers, tokens, kv_heads, kv, head_dim)."""
        return torch.randn(2, tokens, 3, 2, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)

    def test_shape_and_dtype_stay_and_numbers_are_finite(self) -> None:
        for tokens, dtype in product(TOKENS, DTYPES):
            kv = self.kv(tokens, dtype)
            for name in ("on_save", "on_load"):
                kv = getattr(self.transform(), name)(kv)
                told = f"{name} of {tokens} tokens of {dtype}"
                assert isinstance(kv, torch.Tensor), told
                assert (tuple(kv.shape), kv.dtype) == ((2, tokens, 3, 2, 64), dtype), told
                assert bool(kv.isfinite().all()), f"{told} must hold no NaN or infinity"

    def test_the_same_input_gives_the_same_output(self) -> None:
        """Two requests share what one saved, and a second engine finds it."""
        one = self.transform()
        for name in ("on_save", "on_load"):
            made = [getattr(each, name)(self.kv(32, torch.float32)) for each in (one, one, self.transform())]
            assert torch.equal(made[0], made[1]), f"{name} must not depend on what it was given before"
            assert torch.equal(made[0], made[2]), f"{name} must be the same in another process"

    def test_what_comes_back_is_as_close_as_promised(self) -> None:
        for tokens in TOKENS:
            kv = self.kv(tokens, torch.float32)
            back = self.transform().on_load(self.transform().on_save(kv.clone()))
            assert float((back - kv).norm() / kv.norm()) <= self.max_error
