"""Encoded KV through the container and back, and what hostile metadata does."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlab.container import pack, unpack
from kvlab.errors import FormatError
from kvlab.serde import Encoded, get_serde
from kvlab.serde.wire import DTYPES, from_parts, to_parts

AXES = ("layers", "tokens", "kv_heads", "kv", "head_dim")


def through_container(encoded: Encoded) -> Encoded:
    parts, metadata = to_parts(encoded)
    value = b"".join(bytes(piece) for piece in pack("k", parts, metadata))
    opened = unpack(value, "k")
    return from_parts(opened.parts, opened.metadata)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tokens: int) -> None:
    shape = (2, tokens, 3, 2, 5)
    raw = torch.randint(0, 256, (2 * tokens * 30 * dtype.itemsize,), dtype=torch.uint8)
    kv = raw.view(dtype).reshape(shape)
    back = through_container(get_serde("naive").encode(kv, AXES))
    assert (back.shape, back.dtype, back.axes) == (shape, str(dtype).removeprefix("torch."), AXES)
    assert back.parts["payload"].reshape(-1).view(torch.uint8).equal(raw)


def test_parts_are_views_and_aligned() -> None:
    odd = torch.arange(3, dtype=torch.uint8)
    wide = torch.arange(4, dtype=torch.float32)
    parts, metadata = to_parts(Encoded("x", (1,), "bfloat16", ("tokens",), {"payload": odd, "scales": wide}))
    assert list(parts) == ["scales", "payload"]
    odd[0] = 9
    back = from_parts(parts, metadata)
    assert back.parts["payload"][0] == 9
    assert back.parts["scales"].data_ptr() == wide.data_ptr()


def test_unaligned_bytes_are_still_read_right() -> None:
    encoded = Encoded("x", (1,), "bfloat16", ("tokens",), {"scales": torch.tensor([1.5, -2.0])})
    parts, metadata = to_parts(encoded)
    shifted = memoryview(b"?" + bytes(parts["scales"].data))[1:]
    moved = {"scales": type(parts["scales"])("F32", (2,), shifted)}
    assert from_parts(moved, metadata).parts["scales"].tolist() == [1.5, -2.0]


HOSTILE = {
    "shape": ["", "null", "{}", "[-1]", "[1e3]", "[true]", "[99999999999999]", "[1048576,1048576,1048576]",
              json.dumps([1] * 9), "[" * 5000, "[0,1099511627776,1099511627776]", "[" + "9" * 5000 + "]"],
    "dtype": ["", "float64", "nn", "__class__", [], {}],
    "axes": ["null", "[]", "[1]", '["tokens","tokens"]', "[" * 5000],
    "params": ["null", "[]", "3", "{", "[" * 100_000],
}  # fmt: skip


SMALL = Encoded("naive", (2,), "uint8", ("tokens",), {"payload": torch.zeros(2, dtype=torch.uint8)})


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in HOSTILE for value in HOSTILE[field]])
def test_hostile_metadata_is_a_format_error(field: str, value: str) -> None:
    parts, metadata = to_parts(SMALL)
    from_parts(parts, metadata)
    with pytest.raises(FormatError):
        from_parts(parts, {**metadata, field: value})
    with pytest.raises(FormatError):
        from_parts(parts, {key: text for key, text in metadata.items() if key != field})


@given(st.dictionaries(st.sampled_from(["serde", "shape", "dtype", "axes", "params"]), st.text(max_size=12)))
def test_any_metadata_is_an_encoded_or_a_format_error(fields: dict[str, str]) -> None:
    parts, metadata = to_parts(SMALL)
    with suppress(FormatError):
        from_parts(parts, {**metadata, **fields})
