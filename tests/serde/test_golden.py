"""Bytes written by an earlier kvlab are read as they were meant, and today's bytes are the same."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from kvlab.container import unpack
from kvlab.geometry import AXES
from kvlab.serde import Serde, get_serde
from kvlab.serde.wire import from_parts, to_parts
from kvlab.testing.serde import raw

GOLDEN = Path(__file__).parent.parent / "golden" / "serde"
KINDS = sorted(path.parent.name for path in GOLDEN.glob("*/v2.safetensors"))


DECODED_OTHERWISE = {"rotated4", "centered"}  # by a matrix product then; a cosine may round otherwise on another CPU
ENCODED_OTHERWISE = {"centered"}


def serde_of(kind: str) -> Serde:
    return get_serde(
        f"cachegen:tables={GOLDEN / 'cachegen' / 'v2.tables.safetensors'},level=0.25" if kind == "cachegen" else kind
    )


def test_every_kind_has_golden_bytes() -> None:
    assert KINDS == ["cachegen", "cachegen-lmcache", "centered", "fp8", "int4", "int8", "lossless", "naive", "rotated4"]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes_decode_to_what_they_did(kind: str) -> None:
    opened = unpack((GOLDEN / kind / "v2.safetensors").read_bytes(), "golden")
    expected = load_file(GOLDEN / kind / "v2.expected.safetensors")
    back = serde_of(kind).decode(from_parts(opened.parts, opened.metadata))
    if kind in DECODED_OTHERWISE:
        assert (back.float() - expected["decoded"].float()).abs().max() <= 2**-7 * expected[
            "decoded"
        ].float().abs().max()
    else:
        assert raw(back).equal(raw(expected["decoded"]))


@pytest.mark.parametrize("kind", sorted({*KINDS} - ENCODED_OTHERWISE))
def test_todays_bytes_are_the_golden_ones(kind: str) -> None:
    opened = unpack((GOLDEN / kind / "v2.safetensors").read_bytes(), "golden")
    kv = load_file(GOLDEN / kind / "v2.expected.safetensors")["kv"]
    parts, metadata = to_parts(serde_of(kind).encode(kv, AXES))
    assert {name: bytes(part.data) for name, part in parts.items()} == {
        name: bytes(part.data) for name, part in opened.parts.items()
    }
    assert metadata == {key: opened.metadata[key] for key in metadata}
