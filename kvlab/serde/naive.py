"""Bytes as they are."""

import torch

from kvlab.errors import FormatError
from kvlab.serde.base import Encoded, Serde, checked_out


class NaiveSerde(Serde):
    """Stores the tensor's own bytes: as large as the KV, bit-exact, and as fast as a copy."""

    name = "naive"
    lossless = True

    def encode(self, kv: torch.Tensor, axes: tuple[str, ...]) -> Encoded:
        payload = kv.detach().cpu().contiguous()
        return Encoded(self.name, tuple(kv.shape), str(kv.dtype).removeprefix("torch."), axes, {"payload": payload})

    def decode(self, encoded: Encoded, out: torch.Tensor | None = None) -> torch.Tensor:
        payload = encoded.parts.get("payload")
        if payload is None or tuple(payload.shape) != encoded.shape or str(payload.dtype) != f"torch.{encoded.dtype}":
            found = "nothing" if payload is None else f"{payload.dtype}{list(payload.shape)}"
            raise FormatError(f"naive payload must be {encoded.dtype}{list(encoded.shape)}, got {found}")
        out = checked_out(encoded, out)
        if out.device.type != "cpu":
            return out.copy_(payload)
        if payload.data_ptr() == out.data_ptr():
            return out  # read to where it belongs
        # Through numpy: a torch copy would start OpenMP threads for whichever thread decodes.
        out.reshape(-1).view(torch.uint8).numpy()[:] = payload.reshape(-1).view(torch.uint8).numpy()
        return out

    def ratio(self) -> float:
        return 1.0
