"""What vLLM reserves, as against what is logically there: block rounding, windows in flight, hybrid page padding.

Models vLLM 0.32: `v1/core/kv_cache_utils.py` (grouping, pages), `v1/kv_cache_interface.py` (blocks per request) and
`platforms/interface.py` (_align_hybrid_block_size). A layout that packs unequal pages side by side is not modelled.
"""

from collections import Counter
from dataclasses import dataclass, replace

from kvlab.errors import ConfigError
from kvlab.sizing.cache_specs import CacheSpec, HeadsKV, LatentKV, StateKV
from kvlab.sizing.curve import KVCurve
from kvlab.sizing.parallel import stages_of
from kvlab.units import parse_bytes

ENGINE_VERSION = "vLLM 0.32"
DEFAULT_BLOCK = 16
CHECKPOINTED = ("Mamba-2", "KDA")  # states whose prefill may leave one more block, the checkpoint


@dataclass(frozen=True)
class Page:
    """One block of one layer. kind: ``full``, ``sliding``, ``chunked`` or ``state``; page_bytes with its padding."""

    kind: str
    spec: CacheSpec
    block_size: int
    page_bytes: int
    window: int = 0

    @property
    def type(self) -> tuple[object, ...]:
        """Layers of one type need the same number of blocks and may form one group though their pages differ."""
        return (self.kind, self.window, self.block_size, self.page_bytes if self.kind == "state" else 0)


@dataclass(frozen=True)
class Group:
    """Layers that share one block table: pages times how many layers have them."""

    pages: tuple[tuple[Page, int], ...]

    @property
    def bytes_per_block(self) -> int:
        return sum(page.page_bytes * count for page, count in self.pages)

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.pages)


@dataclass(frozen=True)
class Reserved:
    """Blocks and bytes that one rank of vLLM sets aside for one sequence of `tokens`."""

    tokens: int
    block_size: int
    groups: tuple[Group, ...]
    blocks_per_group: tuple[int, ...]
    bytes_per_block: int
    engine: str = ENGINE_VERSION

    @property
    def num_blocks(self) -> int:
        """Pool blocks of the whole sequence, over all groups."""
        return sum(self.blocks_per_group)

    @property
    def bytes(self) -> int:
        """Bytes of the whole sequence on one rank."""
        return self.num_blocks * self.bytes_per_block

    def pool_blocks(self, memory: int | str) -> int:
        """Blocks that a KV pool of `memory` per rank has."""
        return parse_bytes(memory) // self.bytes_per_block

    def max_sequences(self, memory: int | str) -> float:
        """Sequences of `tokens` at once, as vLLM's log states its "maximum concurrency"."""
        return self.pool_blocks(memory) / self.num_blocks

    def capacity_tokens(self, memory: int | str) -> int:
        """Tokens, as vLLM's log states its "KV cache size"; holds for sequences of `tokens`."""
        return int(self.max_sequences(memory) * self.tokens)


def reserve(
    size: KVCurve,
    tokens: int,
    *,
    block_size: int = DEFAULT_BLOCK,
    max_num_batched_tokens: int = 8192,
    max_concurrent_batches: int = 2,
    mamba_cache_mode: str = "none",
) -> Reserved:
    """What vLLM 0.32 reserves on one rank for a sequence of `tokens`.

    block_size: tokens per block before vLLM aligns it for hybrid models (16 on most GPUs, 128 on CPU).
    max_num_batched_tokens x max_concurrent_batches tokens may be in flight (2 with async scheduling), and a window
    holds them besides its own.
    mamba_cache_mode: ``none`` keeps one state per sequence, ``align`` (prefix caching of hybrids, vLLM's default for
    them) two, and a third where prefill leaves a checkpoint.
    """
    if size.conventions.engine != "vllm":
        raise ConfigError(
            f"reserved figures model vLLM; size_calculator(..., engine='vllm'), got {size.conventions.engine!r}"
        )
    for label, value in (
        ("tokens", tokens),
        ("block_size", block_size),
        ("max_num_batched_tokens", max_num_batched_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{label} must be positive, got {value}")
    if mamba_cache_mode not in ("none", "align"):
        raise ConfigError(f"mamba_cache_mode must be 'none' or 'align', got {mamba_cache_mode!r}")
    in_flight = max_num_batched_tokens * max_concurrent_batches
    plans = []
    for stage in stages_of(list(size.layers), size.pp):
        specs = [spec.shard(size.tp) for layer in stage for spec in layer.specs]
        if specs:
            plans.append(_plan(size, specs, tokens, block_size, in_flight, mamba_cache_mode == "align"))
    return max(plans, key=lambda plan: plan.bytes_per_block)


def _plan(
    size: KVCurve, specs: list[CacheSpec], tokens: int, block_size: int, in_flight: int, aligned: bool
) -> Reserved:
    block = _hybrid_block_size(size, specs, block_size)
    pages = [_page(size, spec, block) for spec in specs]
    if block != block_size:  # hybrid: states are padded to the attention page
        widest = max(page.page_bytes for page in pages if page.kind != "state")
        pages = [replace(p, page_bytes=max(p.page_bytes, widest)) if p.kind == "state" else p for p in pages]
    groups = _groups(pages)
    return Reserved(
        tokens=tokens,
        block_size=block,
        groups=groups,
        blocks_per_group=tuple(max(_blocks(p, tokens, in_flight, aligned) for p, _ in g.pages) for g in groups),
        bytes_per_block=max(group.bytes_per_block for group in groups),
    )


def _hybrid_block_size(size: KVCurve, specs: list[CacheSpec], block_size: int) -> int:
    """Tokens per block: raised until one attention page holds one recurrent state."""
    state = max((p.fixed_bytes(size.conventions) for p in specs if isinstance(p, StateKV)), default=0)
    per_token = max((p.token_bytes(size.conventions) for p in specs if isinstance(p, HeadsKV | LatentKV)), default=0)
    if not state or not per_token:
        return block_size
    step = max(block_size, 128) if any(isinstance(p, LatentKV) for p in specs) else block_size
    return max(block_size, step * -(-state // (step * per_token)))


def _page(size: KVCurve, spec: CacheSpec, block_size: int) -> Page:
    if isinstance(spec, StateKV):
        return Page("state", spec, block_size, spec.fixed_bytes(size.conventions))
    kind = "cross" if spec.fixed_tokens is not None else "full"
    if spec.window:
        kind = "chunked" if spec.chunked else "sliding"
    return Page(kind, spec, block_size, block_size * spec.token_bytes(size.conventions), spec.window or 0)


def _groups(pages: list[Page]) -> tuple[Group, ...]:
    if len({page.type for page in pages}) == 1:
        return (Group(tuple(Counter(pages).items())),)
    pages = _equal_pages(pages)
    buckets = Counter(pages)
    fewest, most = min(buckets.values()), max(buckets.values())
    per_group = most if most < 1.5 * fewest else fewest
    groups = []
    for page, count in buckets.items():
        num_groups = -(-count // per_group)
        groups += [Group(((page, len(range(i, count, num_groups))),)) for i in range(num_groups)]
    return tuple(groups)


def _equal_pages(pages: list[Page]) -> list[Page]:
    """Every page as large as the largest: by a larger block where that divides, else by padding."""
    largest = max(page.page_bytes for page in pages)
    equal = []
    for page in pages:
        ratio, rest = divmod(largest, page.page_bytes)
        if page.kind == "state" or rest:
            equal.append(replace(page, page_bytes=largest))
        else:
            equal.append(replace(page, page_bytes=largest, block_size=page.block_size * ratio))
    return equal


def _blocks(page: Page, tokens: int, in_flight: int, aligned: bool) -> int:
    """Blocks of one sequence in a group of such pages."""
    if page.kind == "state":
        return 1 if not aligned else 2 + (page.spec.name in CHECKPOINTED if isinstance(page.spec, StateKV) else 0)
    if page.kind == "sliding":  # + 1: a window need not begin at a block's edge
        return -(-min(page.window - 1 + in_flight, tokens) // page.block_size) + 1
    if page.kind == "chunked":
        return -(-min(page.window + in_flight, tokens) // page.block_size)
    held = page.spec.fixed_tokens if page.spec.fixed_tokens is not None else tokens
    return -(-held // page.block_size)
