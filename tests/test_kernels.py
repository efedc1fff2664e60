"""The Triton kernels against their torch twins, in Triton's interpreter (or on a GPU where there is one)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # Triton's interpreter, and its compiler

CHECK = """
import torch
from kvlab.paged import gather, page_layout, scatter
from kvlab.paged.kernels import PageMover
from tests.support.pages import caches

device = "cuda" if torch.cuda.is_available() else "cpu"


def odd(cache):
    # the same values one element further on: narrow words only
    raw = torch.empty(cache.numel() + 1, dtype=cache.dtype, device=device)
    return raw[1:].view(cache.shape).copy_(cache)


checked = 0
for order in ("LBHNC", "LBNHC", "BLHNC", "BLNHC"):
    for dtype in (torch.float32, torch.float16, torch.uint8):
        for aligned in (True, False):
            made = caches(order, dtype, device)
            kv = made if aligned else {name: odd(cache) for name, cache in made.items()}
            name = order if aligned else "LBHNC"
            first = next(iter(kv.values()))
            size = first[0].numel() * first.element_size()
            layout = page_layout(kv, num_blocks=first.shape[0], page_bytes=dict.fromkeys(kv, size), name=name)
            mover = PageMover(layout)
            for ids in ([0], [10, 3, 7], list(range(11))):
                out = torch.full((len(ids), layout.num_layers, size), 0xA5, dtype=torch.uint8, device=device)
                mover.gather(ids, out)
                assert torch.equal(out, gather(layout, ids, torch.empty_like(out)))
                fresh = torch.randint(0, 255, out.shape, dtype=torch.uint8, device=device)
                untouched = [b for b in range(11) if b not in ids]
                before = gather(layout, untouched, layout.buffer(len(untouched), device=device))
                mover.scatter(ids, fresh)
                assert torch.equal(gather(layout, ids, torch.empty_like(out)), fresh)
                assert torch.equal(gather(layout, untouched, layout.buffer(len(untouched), device=device)), before)
                mover.clear(ids)
                assert not gather(layout, ids, torch.empty_like(out)).any()
                assert torch.equal(gather(layout, untouched, layout.buffer(len(untouched), device=device)), before)
                checked += 1
print(checked)
"""


def test_kernels_agree_with_their_torch_twins():
    root = Path(__file__).resolve().parent.parent
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"  # read when the kernels are made: a process of its own
    out = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=env, cwd=root, timeout=280)
    assert out.returncode == 0, out.stderr[-2000:]
    assert int(out.stdout) == 4 * 3 * 2 * 3


WIDE = """
import torch
from triton import compile, language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvlab.paged.kernels import BLOCKS_PER_LAUNCH, _move

ids = ("i32",) * BLOCKS_PER_LAUNCH
sizes = dict.fromkeys(("stride_words", "page_words", "num_layers"), "i32")
constants = dict(WORD=tl.int64, PART=512, ALIGNED=True, RAGGED=False)
signature = dict(page_pointers="*i64", block_ids=ids, buffer="*i64", **sizes)
signature |= dict.fromkeys(("WORD", "PART", "TO_PAGES", "CLEAR", "ALIGNED", "RAGGED"), "constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 2)}
for to_pages, clear in ((True, False), (False, False), (True, True)):
    source = ASTSource(_move, signature, dict(constants, TO_PAGES=to_pages, CLEAR=clear), aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(ptx.count("ld.global.v2.b64"), ptx.count("st.global.v2.b64"))
"""


def test_pages_move_in_accesses_of_16_bytes():
    """512 words of 8 bytes by 128 threads: two loads and two stores each, in the code for an H100; a page is cleared
    without a load."""
    root = Path(__file__).resolve().parent.parent
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, env=env, cwd=root, timeout=280)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == ["2", "2", "2", "2", "0", "2"]
