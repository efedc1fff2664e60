"""`cachegen-lmcache`: what LMCache stores under the name CacheGen, so that the two can be compared.

After LMCache's cachegen_basics.py and cachegen_encoder.py (2024-10): no anchors, no deltas. Every value is divided by
the largest magnitude of its token *over all heads and channels of the layer*, and rounded to 31 levels (32 bins) in
the first layers and 15 (16 bins) after them; then coded with one distribution per (layer, K or V, channel), counted
over the chunk and stored *in the chunk*, 33 numbers of 16 bits whatever the layer's bins, with one 32-bit length a
channel. Differences: the table of bins goes by thirds of the layers instead of a list of model names, a token of
zeros does not divide by zero, the coder is rANS with 12-bit probabilities, and the container is not a pickle.
"""

import numpy as np
import torch

from kvlab.errors import FormatError
from kvlab.serde import rans
from kvlab.serde.anchors import planes_of
from kvlab.serde.base import Encoded, Serde, checked_out
from kvlab.serde.cachegen import as_part, coder, planes_of_writable, symbols_of
from kvlab.serde.groups import checked_axes, need_kv_axes
from kvlab.serde.quantized import checked_parts, finite

SYMBOLS = 32


class CacheGenLMCacheSerde(Serde):
    """Self-contained chunks: nothing is kept beside the model, and every chunk pays for its own tables."""

    name = "cachegen-lmcache"
    needs_kv_axes = True

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        need_kv_axes(self.name, kv, axes)
        planes = planes_of(kv.detach().cpu(), axes).float().flatten(2)
        top = planes.abs().amax(-1, keepdim=True) if planes.shape[2] else planes.new_zeros(*planes.shape[:2], 1)
        if top.numel():
            finite(top)
        most = levels_each_side(len(planes) // 2)
        limit = torch.finfo(torch.bfloat16).max
        scales = top.clamp(max=limit).to(torch.bfloat16)
        inverse = 1 / scales.float()
        inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
        codes = (planes * inverse * most).round_().clamp_(-most, most).add_(most).to(torch.uint8).numpy()
        index = np.arange(codes.shape[0] * codes.shape[2], dtype=np.int32).reshape(codes.shape[0], codes.shape[2])
        flat = index[:, None].astype(np.int64) * SYMBOLS + codes
        frequencies = rans.normalized(
            np.bincount(flat.reshape(-1), minlength=index.size * SYMBOLS).reshape(-1, SYMBOLS)
        )
        model = rans.Model.of(index, frequencies)
        words, lengths = np.zeros(0, np.uint16), np.zeros(index.shape, np.uint16)
        if index.size:
            words, lengths = coder.encode(codes, model, codes.shape[2])
        cdf = torch.from_numpy(model.cum.astype(np.int16).reshape(*index.shape, SYMBOLS + 1))
        parts = {"payload.words": as_part(words), "payload.lengths": torch.from_numpy(lengths.astype(np.int32))}
        parts |= {"tables.cdf": cdf, "scales.max": scales}
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, parts)

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        checked_axes(encoded.shape, encoded.axes, encoded.dtype)
        size = {axis: encoded.shape[encoded.axes.index(axis)] for axis in encoded.axes}
        planes, channels, tokens = 2 * size["layers"], size["kv_heads"] * size["head_dim"], size["tokens"]
        checked_parts(self.name, encoded, {
            "tables.cdf": (torch.int16, (planes, channels, SYMBOLS + 1)),
            "scales.max": (torch.bfloat16, (planes, tokens, 1)),
            "payload.lengths": (torch.int32, (planes, channels)),
        })  # fmt: skip
        cdf = encoded.parts["tables.cdf"].numpy().reshape(-1, SYMBOLS + 1)
        if (cdf[:, 0] != 0).any():
            raise FormatError("a distribution in the chunk does not begin at 0")
        frequencies = np.diff(cdf.astype(np.int32), axis=1)
        lengths = encoded.parts["payload.lengths"]
        if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > 0xFFFF):
            raise FormatError("a lane's length is out of bounds")
        index = np.arange(planes * channels, dtype=np.int32).reshape(planes, channels)
        model = rans.Model.of(index, frequencies) if index.size else None
        parts = {**encoded.parts, "payload.lengths": lengths.to(torch.uint16)}
        result = checked_out(encoded, out)
        if model is None or tokens == 0:
            return result
        inner = Encoded(encoded.serde, encoded.shape, encoded.dtype, encoded.axes, parts)
        symbols = symbols_of(inner, "payload", model, tokens)
        most, scales = levels_each_side(planes // 2), encoded.parts["scales.max"].float()
        limit = torch.finfo(result.dtype).max
        for plane, target in enumerate(planes_of_writable(result, encoded.axes)):
            values = (symbols[plane].float() - most[plane]) * (scales[plane] / most[plane])
            target.copy_(values.clamp_(-limit, limit).view(target.shape))
        return result


def levels_each_side(num_layers: int) -> torch.Tensor:
    """Quantization levels on each side of zero per plane, (planes, 1, 1): 15 (32 bins) or 7 (16 bins).

    LMCache lists K: 32 bins in layers 0-9 of 32, V: 32 bins in layers 0-1; here the same shares of the layers.
    """
    most = [15.0 if layer * 32 < (10, 2)[kv] * num_layers else 7.0 for layer in range(num_layers) for kv in (0, 1)]
    return torch.tensor(most)[:, None, None]
