"""What may happen to the objects of a disk tier, and to pages that the engine frees."""

import os
from contextlib import contextmanager
from pathlib import Path

from tests.connectors.engine import core, worker

GARBAGE = 0x4B  # as float32: thirteen million, finite, so that it can hide behind no mask


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.safetensors") if ".kvlab" not in path.parts)


def cut_short(path: Path, _others: list[Path]) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path, _others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap_content(path: Path, others: list[Path]) -> None:
    path.write_bytes(next(other for other in others if other != path).read_bytes())


def make_empty(path: Path, _others: list[Path]) -> None:
    path.write_bytes(b"")


def make_a_folder(path: Path, _others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


@contextmanager
def overwritten(llm):
    """Pages are filled with garbage when the engine frees them, before anything else happens, and again when it
    allocates them. A freed page that the prefix cache still finds keeps its KV until then: a request may read it."""
    pool, pages, seen = core(llm).kv_cache_manager.block_pool, worker(llm).transfer.layout.pages, []
    originals = pool.free_blocks, pool.get_new_blocks

    def fill(block):
        for layer in pages:
            layer[block.block_id].fill_(GARBAGE)

    def free_blocks(ordered_blocks):
        blocks = list(ordered_blocks)
        originals[0](blocks)
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                seen.append(block.block_id)
                if block.block_hash is None:
                    fill(block)

    def get_new_blocks(num_blocks, *args, **kwargs):
        blocks = originals[1](num_blocks, *args, **kwargs)
        for block in blocks:
            fill(block)
        return blocks

    pool.free_blocks, pool.get_new_blocks = free_blocks, get_new_blocks
    try:
        yield seen
    finally:
        pool.free_blocks, pool.get_new_blocks = originals
