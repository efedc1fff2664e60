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
from kvlab.container import MAX_HEADER_BYTES, SEAL_BYTES, Part, is_cut_short, pack, unpack
from kvlab.errors import ConfigError, FormatError
from kvlab.hostmemory import PAGE
from tests.forged import forged_text, seal_text

KEY = "kvlab:model:0123456789abcdef:00112233"
GOLDEN = Path(__file__).parent / "golden" / "container.v2.safetensors"


def test_an_object_that_is_cut_short_is_known_by_its_seal():
    value = bytes(sample())
    assert value[SEAL_BYTES - 7 : SEAL_BYTES] == b'"key":"'
    assert not is_cut_short(value[:SEAL_BYTES], len(value))
    for num_bytes in (9, 30, 100, SEAL_BYTES - 1, SEAL_BYTES, 4096, len(value) - 1, len(value) + 1):
        assert is_cut_short(value[: min(num_bytes, SEAL_BYTES)], num_bytes), num_bytes
    for other in (b"", b"value", b"12345678", b"x" * 100, (10).to_bytes(8, "little") + b'{"x":1}   '):
        assert not is_cut_short(other, len(other))


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
    assert int.from_bytes(sample()[:8], "little") + 8 == PAGE


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


def test_other_threads_run_while_bytes_are_hashed(hashed_at_once):
    payload = np.arange(1 << 20, dtype=np.uint8)
    stored = b"".join(bytes(piece) for piece in pack(KEY, {"kv": Part("U8", (1 << 20,), payload.data)}))
    assert (1 << 20) in hashed_at_once
    hashed_at_once.clear()
    unpack(stored, KEY)
    assert sum(hashed_at_once) == len(stored)
    assert (1 << 20) in hashed_at_once


LONG = MAX_HEADER_BYTES // 2
# What follows the seal of an object whose checksum is right.
HOSTILE_HEADERS = {
    "a number of many digits": b'},"p":{"dtype":"U8","shape":[' + b"9" * LONG + b'],"data_offsets":[0,0]}}',
    "a shape of many sizes": b'},"p":{"dtype":"U8","shape":[' + b"9," * (LONG // 2) + b'9],"data_offsets":[0,0]}}',
    "sizes of 2**47": b'},"p":{"dtype":"U8","shape":[' + b"140737488355327," * 8 + b'1],"data_offsets":[0,0]}}',
    "strides beyond 64 bits": b'},"p":{"dtype":"U8","shape":[0,99999999999,99999999999],"data_offsets":[0,0]}}',
    "lists in lists": b'},"p":' + b"[" * LONG,
    "many parts": b"}"
    + b"".join(b',"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100))
    + b"}",
    "a part that is a list": b'},"p":[]}',
    "a dtype that is a list": b'},"p":{"dtype":[],"shape":[0],"data_offsets":[0,0]}}',
    "an unknown dtype": b'},"p":{"dtype":"F128","shape":[0],"data_offsets":[0,0]}}',
    "offsets that are text": b'},"p":{"dtype":"U8","shape":[0],"data_offsets":"00"}}',
    "three offsets": b'},"p":{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}}',
    "a shape that is true": b'},"p":{"dtype":"U8","shape":[false],"data_offsets":[0,0]}}',
    "a hole": b'},"p":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
    "metadata that is no text": b',"serde":["naive"]}}',
    "a second key that is a list": b',"key":[]}}',
    "a second metadata": b'},"__metadata__":[]}',
    "not a number": b'},"p":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}',
    "no end": b'},"p":{',
    "not UTF-8": b',"a":"\xff\xfe"}}',
}


@pytest.mark.parametrize("rest", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_header_is_not_read_before_its_checksum(rest, monkeypatch):
    def parsed(*_args, **_more):
        raise AssertionError("the header was parsed though its checksum is wrong")

    value = forged_text(seal_text(KEY) + rest)
    broken = value[:-1] + bytes([value[-1] ^ 1])
    monkeypatch.setattr(container, "parse_json", parsed)
    with pytest.raises(FormatError) as caught:
        unpack(broken, KEY)
    assert caught.value.reason == "checksum"


@pytest.mark.parametrize("rest", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_hostile_header_with_a_right_checksum_is_a_format_error(rest):
    with pytest.raises(FormatError) as caught:
        unpack(forged_text(seal_text(KEY) + rest), KEY)
    assert caught.value.reason == "corrupt"


def test_a_long_number_is_refused_unread(monkeypatch):
    """Python's own limit is a setting of the process, and a number below it costs time with its square."""
    monkeypatch.setattr(container, "int", lambda _digits: pytest.fail("read"), raising=False)
    with pytest.raises(ValueError, match="a number of 8192 digits"):
        container.parse_json("9" * 8192)


def test_a_header_longer_than_the_limit_is_refused_from_both_sides():
    padded = 2 * MAX_HEADER_BYTES
    with pytest.raises(FormatError, match="claims a header"):
        unpack(padded.to_bytes(8, "little") + b" " * padded, KEY)
    with pytest.raises(FormatError, match="claims a header"):
        unpack([memoryview(padded.to_bytes(8, "little") + b" " * padded), memoryview(b"")], KEY)
    with pytest.raises(ConfigError, match="shorten its key or its namespace"):
        pack(KEY, {}, {"namespace": "x" * MAX_HEADER_BYTES})


def test_metadata_cannot_speak_for_the_seal():
    for name in ("kvlab", "bytes", "checksum", "mac", "key"):
        with pytest.raises(ConfigError, match="names of the seal"):
            pack(KEY, {}, {name: "0"})
