"""`lossless` on the device where the pages lie: bf16 pages, a window for each channel."""

from collections.abc import Mapping, Sequence

import torch
import triton

from kvlab.codecs import lossless_triton as kernels
from kvlab.codecs.addresses import Addresses
from kvlab.codecs.plan import Plan, num_tokens_of
from kvlab.errors import ConfigError, FormatError
from kvlab.serde import bitpack
from kvlab.serde.base import Encoded
from kvlab.serde.window import ENOUGH_ROWS

ESCAPES = 8  # one element in so many may be an escape; of real KV it is one in forty
Parts = Mapping[str, torch.Tensor]


class LosslessCodec:
    """Launches over the pages of one KV cache group. Everything is enqueued on the current stream; nothing is waited
    for.

    The window is that of `kvlab.serde.lossless` for chunks of ENOUGH_ROWS tokens and more. Shorter ones, whose window
    is searched for, are the twin's; other windows than a channel's are decoded by the twin.
    """

    name, dtype = "lossless", "bfloat16"

    def __init__(self, addresses: Addresses) -> None:
        page_map = addresses.pages.map
        if page_map.element != torch.bfloat16:
            raise ConfigError(
                f"the GPU's lossless programs take bf16 pages, got {page_map.element}; the twin takes all"
            )
        self._at, self._map, self.pages = addresses, page_map, addresses.pages
        self._period = page_map.kv_heads * len(page_map.planes) * page_map.head_dim
        # What is the same for the engine's life is compiled in: an element's place takes four divisions by it.
        self._engine = (self._period, page_map.block_tokens, page_map.head_dim, len(page_map.planes))
        self._tokens = torch.cat([plane.tokens for plane in addresses.planes])
        each = [plane.heads[:, None] + plane.channels for plane in addresses.planes]  # (kv_heads, head_dim)
        self._channels = torch.stack(each, dim=1).flatten().contiguous()  # (kv_heads, kv, head_dim)

    def takes(self, num_tokens: int) -> bool:
        """Whether an object of so many tokens is encoded here with the twin's own bytes."""
        return num_tokens >= ENOUGH_ROWS

    def plan(self, num_tokens: int, num_escapes: int | None = None) -> Plan:
        """The parts of an object of so many tokens; with room for as many escapes as are taken, or for so many."""
        shape = self._map.shape(self._at.num_layers, num_tokens)
        slab = num_tokens * self._period
        count = self._at.num_layers * slab
        room = count // ESCAPES if num_escapes is None else num_escapes
        parts = {
            "payload.codes": (torch.uint8, bitpack.packed_shape(self._at.num_layers, slab, 3)),
            "tables.base": (torch.uint8, (self._at.num_layers, self._period)),
            "payload.rest": (torch.uint8, (1, count)),
            "payload.escapes": (torch.uint8, (room,)),  # the last: how many there are is known when all else is done
        }
        params = {"coding": "window", "element": self.dtype, "rows": num_tokens, "period": self._period}
        return Plan.of("lossless", shape, self.dtype, params, parts)

    def check(self, encoded: Encoded) -> None:
        """FormatError unless the object is one of this codec's, with the parts of `plan`."""
        escapes = encoded.parts.get("payload.escapes")
        if escapes is None or escapes.dim() != 1:
            raise FormatError("a lossless chunk needs its list of escapes")
        self.plan(num_tokens_of(encoded), escapes.numel()).check(encoded)

    def encode(
        self, objects: Sequence[Sequence[int]], num_tokens: int, buffer: torch.Tensor, flags: torch.Tensor
    ) -> None:
        """Pages of objects of so many tokens each, given as their block ids, into `buffer`, uint8 on their device: one
        `plan` after the other. ``flags[object]``: 1 where there are more escapes than room, and the object is the
        twin's; the number of escapes."""
        plan, places = self.plan(num_tokens), self._places(objects)
        parts = plan.views(buffer[: plan.num_bytes])
        about = (self._at.num_layers, len(objects[0]), plan.num_bytes, self._at.block_stride)
        *_, tiles = sizes = self._sizes(num_tokens)
        slabs, base = len(objects) * self._at.num_layers, parts["tables.base"]
        kernels._windows[(slabs, triton.cdiv(self._period, kernels.CHANNELS))](
            *places, base, *about, num_tokens, *self._engine, kernels.TOKENS, kernels.CHANNELS
        )
        counts = torch.empty((len(objects), self._at.num_layers * 8 * tiles), dtype=torch.int32, device=base.device)
        codes, rest = parts["payload.codes"], parts["payload.rest"]
        kernels._encode[(slabs, tiles)](*places, base, codes, rest, counts, *about, *sizes, *self._engine, kernels.RUN)
        ends = torch.cumsum(counts, 1, dtype=torch.int64)
        escapes = parts["payload.escapes"]
        kernels._escapes[(slabs, tiles)](
            *places, base, ends - counts, escapes, flags, *about, *sizes, escapes.numel(), *self._engine, kernels.RUN
        )
        flags[:, 1].copy_(ends[:, -1])

    def decode(
        self,
        buffer: torch.Tensor,
        objects: Sequence[Sequence[int]],
        num_tokens: int,
        num_escapes: Sequence[int],
        flags: torch.Tensor,
    ) -> None:
        """What `encode` made, each object with so many escapes, into pages; every byte that is none of the tokens'
        stays. ``flags[object, 0]`` becomes 1 where the codes name more or fewer escapes: then nothing is written."""
        plan, places = self.plan(num_tokens), self._places(objects)
        parts = plan.views(buffer[: plan.num_bytes])
        *_, tiles = sizes = self._sizes(num_tokens)
        slabs, codes = len(objects) * self._at.num_layers, parts["payload.codes"]
        counts = torch.empty((len(objects), self._at.num_layers * 8 * tiles), dtype=torch.int32, device=codes.device)
        kernels._count[(slabs, tiles)](codes, counts, self._at.num_layers, plan.num_bytes, *sizes, kernels.RUN)
        ends = torch.cumsum(counts, 1, dtype=torch.int64)
        wanted = self._at.table(num_escapes, torch.int64)
        kernels._scatter[(slabs, tiles)](
            *places, parts["tables.base"], codes, parts["payload.rest"], parts["payload.escapes"], ends - counts,
            ends[:, -1].contiguous(), wanted, flags, self._at.num_layers, len(objects[0]), plan.num_bytes,
            self._at.block_stride, *sizes, *self._engine, kernels.RUN,
        )  # fmt: skip

    def _places(self, objects: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        return self._at.pointers, self._at.ids(objects), self._tokens, self._channels

    def _sizes(self, num_tokens: int) -> tuple[int, int, int]:
        """Elements of a slab, bytes of one of its eight runs, tiles."""
        slab = num_tokens * self._period
        run_bytes = -(-slab // 8)
        return slab, run_bytes, triton.cdiv(run_bytes, kernels.RUN)
