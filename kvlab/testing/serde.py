"""What every serde promises. Subclass `SerdeTests`, give a `serde` fixture, inherit the tests.

@pytest.fixture(scope="module")
def serde():
    return get_serde("mine:option=1")

class TestMine(SerdeTests):
    max_error = 0.05
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.container import Part, pack, packed_bytes, unpack
from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.serde import Encoded, Serde, get_serde
from kvlab.serde.wire import from_parts, to_parts
from kvlab.testing.wanted import refused

PAGES = ("blocks", "layers", "page_bytes")
FLOATS = ("bfloat16", "float16", "float32")
BIT_EXACT = (*FLOATS, "float8_e4m3fn", "float8_e5m2")
ODD_TOKENS = (0, 1, 2, 9, 10, 11, 31)


def kv_like(shape: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0) -> torch.Tensor:
    """Normal numbers whose channels differ in size, as those of real KV do."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    source = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-3, 4, shape[-1:], generator=source).float()) if shape else torch.ones(())
    return (torch.randn(shape, generator=source) * spread).to(torch_dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


CHECKED_OUT = " with a FormatError (see kvlab.serde.base.checked_out)"


class SerdeTests:
    """The suite. Class attributes say what to expect of the serde; `serde` is a fixture of the module or session."""

    layers, kv_heads, head_dim = 3, 2, 16  # change them where a serde is made for one model
    max_error: ClassVar[float] = 0.0  # relative L2 error allowed on normal numbers; unused by lossless serdes
    mutations: ClassVar[int] = 10_000
    of_one_model: ClassVar[bool] = False  # it takes no other number of layers, heads and channels

    def shape(self, tokens: int) -> tuple[int, ...]:
        return (self.layers, tokens, self.kv_heads, 2, self.head_dim)

    def dtypes(self, serde: Serde) -> tuple[str, ...]:
        return BIT_EXACT if serde.lossless else FLOATS

    def through_container(self, encoded: Encoded) -> Encoded:
        parts, metadata = to_parts(encoded)
        value = b"".join(bytes(memoryview(piece)) for piece in pack("k", parts, metadata))
        opened = unpack(value, "k")
        return from_parts(opened.parts, opened.metadata)

    def check(self, serde: Serde, kv: torch.Tensor, back: torch.Tensor) -> None:
        assert back.shape == kv.shape, "decode must give the shape that was encoded"
        assert back.dtype == kv.dtype, "decode must give the dtype that was encoded"
        if serde.lossless:
            assert raw(back).equal(raw(kv)), "a lossless serde must give back every bit; else set lossless = False"
            return
        assert bool(torch.isfinite(back).all()), "decode must give finite numbers"
        distance, norm = (back.double() - kv.double()).norm(), kv.double().norm()
        wanted = "the relative L2 error must be at most max_error, which the suite's class sets"
        assert float(distance) <= self.max_error * float(norm), wanted

    @pytest.mark.parametrize("tokens", ODD_TOKENS)
    def test_round_trip_through_the_container(self, serde: Serde, tokens: int) -> None:
        for dtype in self.dtypes(serde):
            kv = kv_like(self.shape(tokens), dtype)
            self.check(serde, kv, serde.decode(self.through_container(serde.encode(kv, AXES))))

    def test_strided_input_is_read_right(self, serde: Serde) -> None:
        kv = kv_like((2, *self.shape(11))).transpose(2, 0)[..., ::1].transpose(2, 0)[1]
        strided = kv_like((*self.shape(11)[:-1], 2 * self.head_dim))[..., ::2]
        for given_kv in (kv, strided):
            self.check(serde, given_kv, serde.decode(serde.encode(given_kv, AXES)))
            assert raw(serde.decode(serde.encode(given_kv, AXES))).equal(
                raw(serde.decode(serde.encode(given_kv.contiguous(), AXES)))
            )

    def test_any_order_of_axes(self, serde: Serde) -> None:
        kv = kv_like(self.shape(12))
        order = (3, 0, 2, 1, 4)
        turned = kv.permute(order).contiguous()
        back = serde.decode(serde.encode(turned, tuple(AXES[axis] for axis in order)))
        self.check(serde, turned, back)

    def test_decodes_into_the_given_memory(self, serde: Serde) -> None:
        kv = kv_like(self.shape(13))
        encoded = serde.encode(kv, AXES)
        out = torch.full_like(kv, 7.0)
        assert serde.decode(encoded, out).data_ptr() == out.data_ptr()
        assert raw(out).equal(raw(serde.decode(encoded)))
        with refused(FormatError, f"decode must refuse an out of another shape{CHECKED_OUT}"):
            serde.decode(encoded, torch.empty(self.shape(14), dtype=kv.dtype))
        with refused(FormatError, f"decode must refuse an out of another dtype{CHECKED_OUT}"):
            serde.decode(encoded, torch.empty(self.shape(13), dtype=torch.float64))

    def test_same_input_same_bytes(self, serde: Serde) -> None:
        kv = kv_like(self.shape(21))
        first, second = serde.encode(kv, AXES), serde.encode(kv.clone(), AXES)
        assert first.params == second.params
        assert first.parts.keys() == second.parts.keys()
        assert all(raw(first.parts[name]).equal(raw(second.parts[name])) for name in first.parts)

    def test_zeros_and_constants_come_back(self, serde: Serde) -> None:
        assert not serde.decode(serde.encode(torch.zeros(self.shape(12)), AXES)).any()

    @pytest.mark.parametrize("part", [1.0, 0.5])
    def test_numbers_near_the_dtypes_end_come_back_finite(self, serde: Serde, part: float) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            wide = kv_like(self.shape(11), "float32").double()
            for numbers in (wide / wide.abs().amax(), wide.sign()):
                kv = (numbers * part * torch.finfo(dtype).max).to(dtype)
                back = serde.decode(self.through_container(serde.encode(kv, AXES)))
                assert serde.lossless or torch.isfinite(back).all()
                if not self.of_one_model:
                    self.check(serde, kv, back)

    @pytest.mark.parametrize("axis", [0, 1, 2, 4])
    def test_an_axis_of_nothing_comes_back(self, serde: Serde, axis: int) -> None:
        if axis != 1 and self.of_one_model:
            return
        shape = list(self.shape(11))
        shape[axis] = 0
        kv = torch.zeros(shape)
        self.check(serde, kv, serde.decode(self.through_container(serde.encode(kv, AXES))))

    def test_bits_add_up_to_the_length_on_a_medium(self, serde: Serde) -> None:
        encoded = serde.encode(kv_like(self.shape(31)), AXES)
        parts, metadata = to_parts(encoded)
        buffers = pack("k", parts, metadata)
        header = memoryview(buffers[0]).nbytes
        assert sum(encoded.bits().values()) // 8 + header == packed_bytes(buffers)
        assert header % 4096 == 0

    def test_spec_makes_an_equal_serde(self, serde: Serde) -> None:
        again = get_serde(serde.spec)
        assert again.spec == serde.spec
        assert again.name == serde.name
        assert repr(again) == f"get_serde({serde.spec!r})"
        kv = kv_like(self.shape(12))
        assert raw(again.decode(serde.encode(kv, AXES))).equal(raw(serde.decode(again.encode(kv, AXES))))

    def test_opaque_pages_are_kept_exactly_or_refused_with_the_reason(self, serde: Serde) -> None:
        pages = kv_like((2, 3, 512)).view(torch.uint8)
        if serde.needs_kv_axes:
            wanted = "encode with needs_kv_axes must refuse pages with a ConfigError that names the axes"
            with refused(ConfigError, f"{wanted} (see kvlab.serde.groups.need_kv_axes)", r"K from V|axes"):
                serde.encode(pages, PAGES)
        else:
            assert raw(serde.decode(self.through_container(serde.encode(pages, PAGES)))).equal(raw(pages))

    def test_non_finite_values_are_kept_or_refused(self, serde: Serde) -> None:
        for bad in (float("nan"), float("inf"), -float("inf")):
            kv = kv_like(self.shape(12))
            kv[1, 3, 0, 1, 5] = bad
            if serde.lossless:
                assert raw(serde.decode(serde.encode(kv, AXES))).equal(raw(kv))
            else:
                wanted = "a lossy serde must refuse NaN and infinity: ConfigError with the words 'NaN or infinity'"
                with refused(ConfigError, wanted, "NaN or infinity"):
                    serde.encode(kv, AXES)

    def test_large_and_small_numbers_do_not_overflow(self, serde: Serde) -> None:
        for dtype in FLOATS:
            for size in (torch.finfo(getattr(torch, dtype)).max, torch.finfo(getattr(torch, dtype)).tiny):
                kv = kv_like(self.shape(12), "float32").clamp(-1, 1).mul(size).to(getattr(torch, dtype))
                assert bool(torch.isfinite(serde.decode(serde.encode(kv, AXES))).all())

    def test_any_bit_pattern(self, serde: Serde) -> None:
        if not serde.lossless:
            return
        any_bits(serde)

    def test_broken_input_is_a_format_error(self, serde: Serde) -> None:
        """Flipped bits, cut-off parts, changed metadata: a FormatError or a tensor of the stated shape."""
        broken = 0
        for encoded in mutants(serde.encode(kv_like(self.shape(11)), AXES), self.mutations):
            try:
                back = serde.decode(encoded) if isinstance(encoded, Encoded) else encoded
                assert tuple(back.shape) == encoded.shape
            except FormatError:
                broken += 1
        assert broken > 0, "decode must notice broken input: raise FormatError where parts disagree with the shape"


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(BIT_EXACT),
    shape=st.tuples(*[st.integers(0, 3), st.integers(0, 9), st.integers(1, 2), st.just(2), st.integers(1, 9)]),
    data=st.data(),
)
def _any_bits(serde: Serde, dtype: str, shape: tuple[int, ...], data: Any) -> None:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    size = torch.Size(shape).numel() * torch_dtype.itemsize
    kind = data.draw(st.sampled_from(["random", "few", "drawn"]))
    source = random.Random(data.draw(st.integers(0, 2**32)))
    if kind == "drawn":
        content = data.draw(st.binary(min_size=min(size, 64), max_size=min(size, 64)))
        content = (content * (size // max(1, len(content)) + 1))[:size]
    else:
        content = source.randbytes(size) if kind == "random" else bytes(source.choices((0, 127, 128, 255), k=size))
    bits = torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    kv = bits.view(torch_dtype).reshape(shape)
    assert raw(serde.decode(serde.encode(kv, AXES))).equal(bits)


def any_bits(serde: Serde) -> None:
    """Hypothesis over all dtypes, odd shapes and any content, NaN payloads, infinities and -0 among them."""
    _any_bits(serde)


def mutants(encoded: Encoded, count: int) -> Iterator[Encoded]:
    """`count` broken copies of `encoded`, the same every time; what `from_parts` refuses comes without parts."""
    source = random.Random(0)
    parts, metadata = to_parts(encoded)
    for _ in range(count):
        changed, fields = dict(parts), dict(metadata)
        name = source.choice(list(parts))
        data = bytearray(parts[name].data)
        how = source.random()
        if how < 0.55 and data:  # flip a few bits
            for _ in range(source.choice((1, 1, 8))):
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
            changed[name] = Part(parts[name].dtype, parts[name].shape, memoryview(bytes(data)))
        elif how < 0.7:  # cut off or lengthen
            length = source.randrange(len(data) + 9)
            cut = bytes(data[:length]).ljust(length, b"\x5a")
            width = parts[name].nbytes // max(1, torch.Size(parts[name].shape).numel()) or 1
            changed[name] = Part(parts[name].dtype, (length // width,), memoryview(cut[: length // width * width]))
        elif how < 0.75:
            del changed[name]
        else:
            field = source.choice(("shape", "dtype", "axes", "params"))
            fields[field] = _mutated(fields[field], source)
        try:
            yield from_parts(changed, fields)
        except FormatError:
            yield replace(encoded, parts={}, params={"broken": True})


def _mutated(text: str, source: random.Random) -> str:
    """`text` with a digit or letter changed, or a number made hostile."""
    if source.random() < 0.3:
        return text.replace(source.choice("0123456789"), source.choice(("-1", "4096", "99999999999", "null", "1e9")))
    at = source.randrange(len(text))
    return text[:at] + source.choice('0123456789abz"[]{},:-') + text[at + 1 :]
