"""What may happen to the objects of a folder."""

import os
from contextlib import suppress
from pathlib import Path

SMALL = 8  # files below this part of the largest are not objects: indexes, locks, journals


def objects(folder: Path) -> list[Path]:
    """The files that hold KV, by their sizes: what a connector calls them is its own affair."""
    sizes: dict[Path, int] = {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):  # a connector may remove it at any time
            if path.is_file():
                sizes[path] = path.stat().st_size
    largest = max(sizes.values(), default=0)
    return [path for path, size in sizes.items() if size and size * SMALL >= largest]


def cut_short(path: Path, _others: list[Path]) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path, _others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_bits(path: Path, _others: list[Path]) -> None:
    """In every fifth of 4,096 bytes, the highest but one: a float's exponent, wherever floats begin."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for at in range(middle, min(middle + 4096, len(data)), 5):
        data[at] ^= 0x40
    path.write_bytes(data)


def swap_content(path: Path, others: list[Path]) -> None:
    """The content of the next object, of the same size where there is one."""
    here, size = others.index(path), path.stat().st_size
    turned = [*others[here + 1 :], *others[:here]] or [path]
    path.write_bytes(next((one for one in turned if one.stat().st_size == size), turned[0]).read_bytes())


def make_empty(path: Path, _others: list[Path]) -> None:
    path.write_bytes(b"")


def make_a_folder(path: Path, _others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def remove(path: Path, _others: list[Path]) -> None:
    path.unlink()
