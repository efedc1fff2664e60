"""The byte format: golden bytes, plain safetensors, and no damage that is not seen."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab import container
from kvlab.container import ALIGNMENT, HASHED_AT_ONCE, MAX_HEADER_BYTES, Part, pack, unpack
from kvlab.errors import FormatError

KEY = "kvlab:model:0123456789abcdef:00112233"
GOLDEN = Path(__file__).parent / "golden" / "container.v2.safetensors"


def sample() -> bytes:
    payload = np.arange(600, dtype=np.uint8)
    scales = np.linspace(0, 1, 7, dtype=np.float32)
    parts = {
        "scales": Part("F32", (7,), scales.data),
        "payload": Part("U8", (2, 300), payload.data),
    }
    return b"".join(bytes(piece) for piece in pack(KEY, parts, {"serde": "naive", "num_tokens": "32"}))


def test_golden_bytes():
    assert sample() == GOLDEN.read_bytes()


def test_round_trip_and_alignment():
    opened = unpack(sample(), KEY)
    assert bytes(opened.parts["payload"].data) == bytes(np.arange(600, dtype=np.uint8))
    assert opened.parts["scales"].shape == (7,)
    assert opened.metadata["num_tokens"] == "32"
    assert int.from_bytes(sample()[:8], "little") + 8 == ALIGNMENT


def test_plain_safetensors_opens_it():
    with safetensors.safe_open(GOLDEN, "np") as file:
        assert file.metadata()["key"] == KEY
        assert file.get_tensor("payload").shape == (2, 300)


@settings(max_examples=400)
@given(st.integers(0, len(sample()) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_seen(at, bit):
    broken = bytearray(sample())
    broken[at] ^= 1 << bit
    with pytest.raises(FormatError):
        unpack(broken, KEY)


@settings(max_examples=200)
@given(st.integers(0, len(sample()) - 1))
def test_any_truncation_is_seen(length):
    with pytest.raises(FormatError):
        unpack(sample()[:length], KEY)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_format_error(data):
    with pytest.raises(FormatError):
        unpack(data, KEY)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (KEY + "x", sample(), "wrong_key"),
        (KEY, sample() + b"x", "corrupt"),
        (KEY, b"", "truncated"),
        (KEY, (2**60).to_bytes(8, "little") + b"{}", "corrupt"),
        (KEY, sample().replace(b'"kvlab":"2"', b'"kvlab":"9"'), "version"),
    ],
)
def test_reasons(key, value, reason):
    with pytest.raises(FormatError) as caught:
        unpack(value, key)
    assert caught.value.reason == reason
    assert MAX_HEADER_BYTES < 2**60


def test_a_part_of_the_wrong_length_is_refused():
    with pytest.raises(FormatError, match="must hold 8 bytes"):
        pack(KEY, {"payload": Part("F32", (2,), memoryview(b"1234"))})


@pytest.fixture
def hashed_at_once(monkeypatch):
    """The lengths of what xxhash is given at a time: above 64 KiB it lets go of the interpreter while it hashes."""
    lengths = []

    class Recorded:
        def __init__(self):
            self._digest = xxhash.xxh3_128()
            self.hexdigest = self._digest.hexdigest

        def update(self, piece):
            lengths.append(memoryview(piece).nbytes)
            self._digest.update(piece)

    monkeypatch.setattr(container, "xxhash", SimpleNamespace(xxh3_128=Recorded))
    return lengths


def test_a_save_lets_the_engine_run_while_it_hashes_and_a_load_keeps_the_interpreter(hashed_at_once):
    payload = np.arange(1 << 20, dtype=np.uint8)
    stored = b"".join(bytes(piece) for piece in pack(KEY, {"kv": Part("U8", (1 << 20,), payload.data)}))
    assert (1 << 20) in hashed_at_once
    hashed_at_once.clear()
    unpack(stored, KEY)
    assert sum(hashed_at_once) == len(stored)
    assert max(hashed_at_once) == HASHED_AT_ONCE


def hostile(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


LONG = MAX_HEADER_BYTES // 4
HOSTILE_HEADERS = {
    "a number of many digits": b'{"__metadata__":{"kvlab":"1"},"p":{"dtype":"U8","shape":[' + b"9" * LONG + b"]}}",
    "a shape of many sizes": b'{"p":{"dtype":"U8","shape":[' + b"9," * LONG + b'9],"data_offsets":[0,0]}}',
    "lists in lists": b"[" * LONG + b"]" * LONG,
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_header_is_not_read_before_its_checksum(header, monkeypatch):
    def parsed(*_args, **_more):
        raise AssertionError("the header was parsed though its checksum is wrong")

    monkeypatch.setattr(container.json, "loads", parsed)
    with pytest.raises(FormatError):
        unpack(hostile(header), KEY)
