"""A serde over an engine's pages, in plain torch: the specification of what a GPU does in one pass.

Pages whose inside is proven are read as typed KV, and the serde's own bytes come out: an object of a page does not tell
in which order the engine's pages lie. Opaque pages go to the kinds that take bytes as they are.
"""

import torch

from kvlab.errors import ConfigError, FormatError
from kvlab.geometry import AXES
from kvlab.paged.typed import Opaque, PageMap
from kvlab.serde.base import Encoded, Serde
from kvlab.serde.groups import FLOATS

PAGES = ("blocks", "layers", "page_bytes")  # axes of opaque pages


class PageCodec:
    """Encodes and decodes pages, uint8 (blocks, layers, page_bytes), with one serde.

    Parameters
    ----------
    serde
        any kind
    page_map
        the proven map of the pages, or why there is none

    Raises
    ------
    ConfigError
        where the serde cannot code such pages, with the reason
    """

    def __init__(self, serde: Serde, page_map: PageMap | Opaque) -> None:
        self.serde, self.map = serde, page_map
        if not serde.needs_kv_axes:
            return
        if isinstance(page_map, Opaque):
            raise ConfigError(
                f"serde {serde.spec!r} must tell K from V, and these pages are opaque: {page_map.reason}; "
                "use naive or lossless"
            )
        if page_map.is_latent and not serde.takes_latents:
            raise ConfigError(
                f"serde {serde.spec!r} codes K and V apart, and this model's pages hold latents (MLA), which are "
                "neither; use int8, int4, fp8, rotated4 or lossless"
            )
        if str(page_map.element).removeprefix("torch.") not in FLOATS:
            raise ConfigError(
                f"serde {serde.spec!r} takes {', '.join(sorted(FLOATS))}, and the engine's pages hold "
                f"{str(page_map.element).removeprefix('torch.')} already; use naive or lossless"
            )

    def encode(self, pages: torch.Tensor, num_tokens: int) -> Encoded:
        """The first `num_tokens` tokens of `pages`; of opaque pages, every byte."""
        if isinstance(self.map, Opaque):
            return self.serde.encode(pages, PAGES)
        return self.serde.encode(self.map.read(pages, num_tokens), AXES)

    def decode(self, encoded: Encoded, pages: torch.Tensor) -> None:
        """Write the object's tokens into `pages`, contiguous; every other byte stays.

        Raises FormatError, and has written nothing, where the object is none of these pages.
        """
        if isinstance(self.map, Opaque):
            if encoded.axes != PAGES or encoded.shape != tuple(pages.shape) or encoded.dtype != "uint8":
                raise FormatError(f"the object holds {_told(encoded)}, not {PAGES} {list(pages.shape)}")
            pages.copy_(self.serde.decode(encoded))
            return
        check_fits(encoded, self.map, pages.shape[1], pages.shape[0])
        self.map.write(self.serde.decode(encoded), pages)


def check_fits(encoded: Encoded, page_map: PageMap, num_layers: int, num_blocks: int) -> None:
    """FormatError unless `encoded` is typed KV of so many pages like these, up to a token of the last."""
    dtype = str(page_map.element).removeprefix("torch.")
    num_tokens = encoded.shape[1] if len(encoded.shape) == len(AXES) else -1
    fits = (num_blocks - 1) * page_map.block_tokens < num_tokens <= num_blocks * page_map.block_tokens
    want = page_map.shape(num_layers, num_tokens)
    if encoded.axes != AXES or encoded.dtype != dtype or encoded.shape != want or not (fits or not num_tokens):
        raise FormatError(
            f"the object holds {_told(encoded)}, {num_blocks} blocks of {page_map} in {num_layers} layers do not",
            reason="wrong_shape",
        )


def _told(encoded: Encoded) -> str:
    return f"{encoded.dtype}{list(encoded.shape)} of axes {', '.join(encoded.axes)}"[:200]
