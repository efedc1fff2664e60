"""The GPU's codecs against their twins, in Triton's interpreter (or on a GPU where there is one)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # Triton's interpreter, and its compiler

ROOT = Path(__file__).resolve().parent.parent


def ran(*command: str, **changed: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | changed
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=560)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.timeout(600)
def test_encoded_bytes_and_decoded_pages_are_the_twins():
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    out = ran("benchmarks/gpu_codecs.py", "--check-only", "--small", **interpreted)
    found = re.fullmatch(r"(\d+) checks agree with the twins, \d+ s\n", out)
    assert found, out
    assert int(found[1]) > 80


PTX = """
from triton import compile, language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvlab.codecs import centered_triton, rotated_triton, scaled_triton as kernels

pointers = dict(page_pointers="*i64", ids="*i32", tokens="*i32", heads="*i32", channels="*i32", payload="*i8",
                scales="*i16", scales_low="*i16", flags="*i32")
even = ("block_stride", "object_bytes", "group", "first_channel", "head_dim", "width", "half", "run")
for name, kinds in (("_encode_by_token", (0, 1, 2)), ("_encode_by_channel", (0, 1, 2)), ("_decode", (0, 1, 2))):
    program = getattr(kernels, name)
    for kind in kinds:
        constants = dict(KIND=kind, FLOAT=0, WORD=tl.int16, STRIDE=1, ALIGN=8, TOKENS=16, CHANNELS=64,
                         BY_CHANNEL=True, LARGEST=3.3895313892515355e38)
        names = program.arg_names
        constants = {key: value for key, value in constants.items() if key in names}
        signature = {key: pointers.get(key, "constexpr" if key in constants else "i32") for key in names}
        aligned = {(at,): [["tt.divisibility", 16]] for at, key in enumerate(names) if key in pointers or key in even}
        source = ASTSource(program, signature, constants, aligned)
        built = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        ptx = built.asm["ptx"]
        print(name, kind, ptx.count("fma.rn"), ptx.count(".ftz"), ptx.count("div.full"), ptx.count("global.v4.b32"))

pointers |= dict(scales="*i16", first="*i32", second="*i32", cosines="*fp64", sines="*fp64", room="*fp32", mean="*fp32")
for module, name in ((rotated_triton, "_encode"), (rotated_triton, "_decode"), (centered_triton, "_centre"),
                     (centered_triton, "_restore"), (centered_triton, "_values"), (centered_triton, "_restore_values")):
    program = getattr(module, name)
    constants = dict(FLOAT=0, WORD=tl.int16, STRIDE=1, ALIGN=8, TOKENS=16, CHANNELS=64, PAIRS=32, BLOCK=64, ROOT=0.125,
                     LARGEST=3.3895313892515355e38)
    names = program.arg_names
    constants = {key: value for key, value in constants.items() if key in names}
    signature = {key: pointers.get(key, "constexpr" if key in constants else "i32") for key in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, key in enumerate(names) if key in pointers or key in even}
    source = ASTSource(program, signature, constants, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    wide = ptx.count("global.v4.b32") + ptx.count("global.v2.b64")
    approximate = ptx.count("div.full") + ptx.count("sqrt.approx")
    print(name, module.__name__, ptx.count("fma.rn"), ptx.count(".ftz"), approximate, wide)
"""


def test_programs_for_a_gpu_round_as_the_twins_do_and_move_16_bytes_at_once():
    """In the code for an H100: no multiplication is fused with an addition, no small number becomes zero, no division
    is approximate; pages are read or written in accesses of 16 bytes."""
    lines = ran("-c", PTX).splitlines()
    assert len(lines) == 15
    for line in lines:
        _, _, fused, flushed, approximate, wide = line.split()
        assert (fused, flushed, approximate) == ("0", "0", "0"), line
        assert int(wide) > 0 or "centered" in line, line  # which takes pairs of channels apart
