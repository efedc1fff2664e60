"""Hostile objects with right checksums, made from good ones of every kind: what comes out is a FormatError or a tensor.

    python -m tests.fuzz.objects --rounds 100000 --seed 7

Each object goes through the container, the wire and its serde, and through `CacheEngine`. Nothing but FormatError may
leave the former, nothing the latter; a decoded tensor has the stated shape; the address space of the process is
limited, so an input for which much is allocated fails like any other. A failure prints the seed of its round.
"""

import argparse
import json
import logging
import random
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from kvlab.container import ITEM_BYTES, unpack
from kvlab.engine import CacheEngine
from kvlab.errors import FormatError
from kvlab.geometry import AXES
from kvlab.serde.wire import from_parts
from kvlab.stated import Expected
from kvlab.stores import open_store
from kvlab.testing.serde import PAGES, kv_like
from tests.forged import SEAL, data_of, forged, forged_text, header_of
from tests.serde.kinds import SPECS, serde_of

TOKENS = 23
DECODED_BYTES = 16 << 20  # a reader without a shape in mind takes so much
MEMORY_BYTES = 512 << 20  # over what the process has when it begins
ODD = (-1, 0, 1, 2, 3, 7, 8, 255, 256, 4095, 4096, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**63, 2**64)
OTHER: tuple[Any, ...] = (None, True, False, 1.5, 1e308, "", "x", "9" * 5000, "²", "/etc/passwd", [], {}, [[]], [1] * 9)
Metadata = dict[str, Any]


def kinds() -> list[tuple[str, tuple[str, ...]]]:
    """Specs of serdes, and the axes of what each encodes here."""
    return [(spec, AXES) for spec in SPECS] + [("naive", PAGES), ("lossless", PAGES)]


def kv_of(axes: tuple[str, ...]) -> torch.Tensor:
    return kv_like((3, TOKENS, 2, 2, 16)) if axes == AXES else kv_like((4, 3, 256)).view(torch.uint8)


class Target:
    """One kind: an engine that writes and reads it, and a good object."""

    def __init__(self, spec: str, axes: tuple[str, ...]) -> None:
        self.spec, self.axes = spec, axes
        self.engine = CacheEngine(open_store("memory://?size=64MiB"), namespace="fuzz")
        self.engine.serde = self.serde = serde_of(spec)
        self.engine._serdes = {self.serde.name: self.serde}
        self.kv = kv_of(axes)
        self.place = {"first_token": 0, "end_token": TOKENS}
        assert self.engine.save_object("k", self.kv, axes, **self.place)
        self.good = bytes(self.engine.store.get("k") or b"")
        assert self.read(self.good) == "tensor"

    def read(self, value: bytes) -> str:
        """The reason of its FormatError, or ``tensor``; any other error is a find."""
        try:
            opened = unpack(value, "k")
            encoded = from_parts(opened.parts, opened.metadata, Expected(max_bytes=DECODED_BYTES))
            if encoded.serde != self.serde.name:
                return "other"
            back = self.serde.decode(encoded)
        except FormatError as error:
            return error.reason
        assert tuple(back.shape) == encoded.shape
        assert back.numel() * back.element_size() <= DECODED_BYTES
        return "tensor"

    def load(self, value: bytes) -> None:
        """Through the engine: what is not expected is a miss, and no error was unforeseen."""
        for out in (None, torch.empty_like(self.kv)):
            self.engine.store.put("k", value)
            back = self.engine.load_object("k", out, axes=self.axes, **self.place)
            assert back is None or back.shape[1:] == self.kv.shape[1:] or out is None
        assert not self.engine.counters.misses["error"]


# ---- mutations


def odd(source: random.Random) -> Any:
    return source.choice(ODD) if source.random() < 0.7 else source.choice(OTHER)


def change_inside(value: Any, source: random.Random) -> Any:
    """A JSON value with something in it replaced."""
    if isinstance(value, list) and value and source.random() < 0.9:
        at = source.randrange(len(value))
        return [*value[:at], change_inside(value[at], source), *value[at + 1 :]]
    if isinstance(value, dict) and value and source.random() < 0.9:
        name = source.choice(list(value))
        return {**value, name: change_inside(value[name], source)}
    return odd(source)


def change_entry(header: Metadata, data: bytes, source: random.Random) -> bytes:
    """Something in a part's entry."""
    name = source.choice([name for name in header if name != "__metadata__"])
    how = source.random()
    if how < 0.6:
        header[name] = change_inside(header[name], source)
    elif how < 0.7:
        header[name]["dtype"] = source.choice([*ITEM_BYTES, "F64", "BOOL", "", 3, []])
    elif how < 0.8:
        del header[name]
    elif how < 0.9:
        header[source.choice(["payload", "scales", "x" * 3000, "a\nb", *header])] = header.pop(name)
    else:
        header |= {f"{name}.{i}": header[name] for i in range(source.choice((1, 70)))}
    return forged(header, data)


def change_metadata(header: Metadata, data: bytes, source: random.Random) -> bytes:
    """A field of the metadata: the JSON in it, its text or its type."""
    metadata = header["__metadata__"]
    name = source.choice([name for name in metadata if name not in (*SEAL, "key", "namespace")])
    how = source.random()
    try:
        inside = json.loads(metadata[name])
    except ValueError:
        inside = metadata[name]
    if how < 0.7:
        changed = change_inside(inside, source)
        metadata[name] = changed if isinstance(changed, str) and not isinstance(inside, str) else json.dumps(changed)
    elif how < 0.85:
        metadata[name] = odd(source)
    else:
        metadata[name] = source.choice(
            ["cachegen:tables=/etc/passwd", "lossless", "naive", "[" * 3000, "9" * 5000, "é\n"]
        )
    return forged(header, data)


def change_size(header: Metadata, data: bytes, source: random.Random) -> bytes:
    """Some axes of the KV together with all parts that have axes of these lengths: what is wrong is seen late, if at
    all. Data is cut, or padded with zeros or noise."""
    metadata = header["__metadata__"]
    shape = json.loads(metadata["shape"])
    lengths: dict[int, int] = {}
    for at in source.sample(range(len(shape)), source.choice((1, 1, 1, 2, 3))):
        after = source.choice((0, 0, 1, 2, 7, 16, 31, 64, 300, 4096, 1 << 20, 1 << 40))
        lengths[shape[at]], shape[at] = after, after
    metadata["shape"] = json.dumps(shape)
    offset, pieces = 0, []
    fill = source.choice((b"\0", b"\xff", b"\x7f", b"\x01"))
    keeps = source.random() < 0.5  # what the data is too short for
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        if entry["shape"] == [stop - start] and keeps:  # a list of bytes that goes with no axis
            entry["shape"] = [0 if 0 in lengths.values() else stop - start]
        entry["shape"] = [lengths.get(length, length) for length in entry["shape"]]
        size = min(prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]], 1 << 20)
        pieces.append(data[start:stop][:size].ljust(size, fill))
        entry["data_offsets"] = [offset, offset + size]
        offset += size
    return forged(header, b"".join(pieces))


def change_data(header: Metadata, data: bytes, source: random.Random) -> bytes:
    """Bits, a run of bytes, or the length."""
    changed = bytearray(data)
    how = source.random()
    if how < 0.5:
        for _ in range(source.choice((1, 8, 100))):
            changed[source.randrange(len(changed))] = source.randrange(256)
    elif how < 0.8:
        start, length = source.randrange(len(changed)), source.randrange(1, 500)
        changed[start : start + length] = source.choice((b"\0", b"\xff", b"\x7f")) * len(
            changed[start : start + length]
        )
    else:
        changed = changed[: source.randrange(len(changed))]
    return forged(header, bytes(changed))


def change_text(header: Metadata, data: bytes, source: random.Random) -> bytes:
    """The header's JSON behind the seal, as text."""
    fields = {**SEAL, **{name: text for name, text in header.pop("__metadata__").items() if name not in SEAL}}
    text = bytearray(json.dumps({"__metadata__": fields, **header}, separators=(",", ":")).encode())
    begin = text.index(b'"key"')
    for _ in range(source.choice((1, 2, 5))):
        at = source.randrange(begin, len(text))
        piece = source.choice(
            (b"9" * source.choice((1, 20, 5000)), b"[" * 3000, b'"', b"}", b"-", b"\\u0000", b"\xff", b"NaN")
        )
        text[at : at + source.choice((0, 1, 3))] = piece
    return forged_text(bytes(text), data)


def change_nothing_sealed(header: Metadata, data: bytes, source: random.Random) -> bytes:
    """Any byte of the file, the checksum not made right."""
    value = bytearray(forged(header, data))
    for _ in range(source.choice((1, 3))):
        value[source.randrange(min(len(value), source.choice((8, 400, len(value)))))] = source.randrange(256)
    return bytes(value[: source.choice((len(value), len(value), source.randrange(len(value))))])


MUTATIONS: tuple[Callable[[Metadata, bytes, random.Random], bytes], ...] = (
    change_entry, change_metadata, change_metadata, change_size, change_size, change_data, change_text,
    change_nothing_sealed,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    targets = [Target(spec, axes) for spec, axes in kinds()]
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    reasons: Counter[str] = Counter()
    failures = 0
    for number in range(options.rounds):
        source = random.Random(f"{options.seed}/{number}")
        target, mutation = source.choice(targets), source.choice(MUTATIONS)
        value = mutation(header_of(target.good), data_of(target.good), source)
        try:
            reasons[target.read(value)] += 1
            target.load(value)
        except BaseException:
            failures += 1
            target.engine.counters.misses.clear()
            print(f"round {number} of seed {options.seed}: {target.spec} {target.axes[0]} {mutation.__name__}")
            traceback.print_exc(limit=-4, file=sys.stdout)
            if failures >= 20:
                break
    print(
        f"{options.rounds} objects, {failures} failures;", ", ".join(f"{n} {name}" for name, n in reasons.most_common())
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
