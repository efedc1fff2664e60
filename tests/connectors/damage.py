"""What of kvlab's own may be damaged: the objects of a disk tier, and pages that the engine frees."""

from pathlib import Path

from kvlab.judge.damage import cut_short, flip_a_bit, make_a_folder, make_empty, swap_content
from kvlab.judge.engine import overwritten

__all__ = [
    "GARBAGE",
    "cut_short",
    "flip_a_bit",
    "make_a_folder",
    "make_empty",
    "objects",
    "overwritten",
    "swap_content",
]
GARBAGE = 0x4B  # each byte of what `overwritten` leaves in a page of float32


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if ".kvlab" not in path.parts)
