"""The GPU decoders against the reference: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # Triton's interpreter

CHECK = """
import sys
import numpy as np, torch
from kvlab.geometry import AXES
from kvlab.serde import get_serde, rans
from kvlab.serde.lossless_triton import decode_on_device
from kvlab.serde import rans_triton
from kvlab.testing.serde import PAGES, kv_like, raw

device = sys.argv[1]
for shape in ((2, 24, 2, 2, 16), (3, 1, 1, 2, 8), (1, 700, 1, 2, 9)):
    kv = kv_like(shape)
    encoded = get_serde("lossless").encode(kv, AXES)
    assert encoded.params["coding"] == "window", shape
    assert raw(decode_on_device(encoded, device).cpu()).equal(raw(kv)), shape
pages = kv_like((2, 2, 512)).view(torch.uint8)
encoded = get_serde("lossless").encode(pages, PAGES)
assert encoded.params["element"] == "bfloat16"
assert decode_on_device(encoded, device).cpu().equal(pages)

source = np.random.default_rng(0)
for planes, steps, channels, alphabet in ((2, 5, 6, 7), (1, 3, 40, 2), (1, 4, 3, 256)):
    model = rans.Model.of(np.arange(planes * channels).reshape(planes, channels),
                          rans.normalized(source.geometric(0.1, (planes * channels, alphabet))))
    symbols = source.integers(0, alphabet, (planes, steps, channels), np.uint8)
    words, lengths = rans.encode(symbols, model, rans.num_lanes(channels, 2))
    starts, ends = rans.lane_bounds(words, lengths, model, steps)
    arrays = (words.view(np.int16), starts, model.index, model.cum.view(np.int16))
    given = [torch.from_numpy(array).to(device) for array in arrays]
    back, ended = rans_triton.decode_on_device(*given, steps)
    assert (back.cpu().numpy() == symbols).all()
    assert (ended[..., 0] == 65536).all()
    assert (ended[..., 1].cpu().numpy() == lengths).all()
print("equal")
"""


@pytest.mark.parametrize("device", ["cuda" if torch.cuda.is_available() else "cpu"])
def test_gpu_decoders_agree_with_the_reference(device: str) -> None:
    environment = dict(
        os.environ, TRITON_INTERPRET="0" if device == "cuda" else "1", PYTHONPATH=os.pathsep.join(sys.path)
    )
    root = Path(__file__).resolve().parent.parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", CHECK, device], env=environment, cwd=root, capture_output=True, text=True, timeout=240
    )
    assert ran.stdout.strip() == "equal", ran.stderr[-3000:]
