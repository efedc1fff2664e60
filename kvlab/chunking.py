"""Cut a prompt into objects: full chunks, then one block-aligned tail.

A *block* is the engine's page (16 tokens on most GPUs); a *chunk* is kvlab's object (256 tokens unless told).
Tokens after the last full block belong to none of these: only a connector that fills an engine's pages can use them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kvlab.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """Blocks [first_block, end_block) of a prompt: one stored object."""

    first_block: int
    end_block: int

    @property
    def num_blocks(self) -> int:
        return self.end_block - self.first_block


@dataclass(frozen=True)
class Chunker:
    """Cuts prompts into objects: chunks of `chunk_tokens`, then one tail of whole blocks.

    Parameters
    ----------
    chunk_tokens
        tokens of one object, a multiple of `block_tokens`
    block_tokens
        tokens of one block: vLLM's ``block_size``

    Raises
    ------
    ConfigError
        where one is no positive integer, or chunks are no whole number of blocks

    Examples
    --------
    >>> Chunker(chunk_tokens=256, block_tokens=16).spans(600)
    [Span(first_block=0, end_block=16), Span(first_block=16, end_block=32), Span(first_block=32, end_block=37)]
    """

    chunk_tokens: int = 256
    block_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.chunk_tokens % self.block_tokens:
            below = self.chunk_tokens // self.block_tokens * self.block_tokens
            near = " or ".join(str(n) for n in (below, below + self.block_tokens) if n)
            raise ConfigError(
                f"chunk_tokens must be a multiple of block_tokens={self.block_tokens}, "
                f"got {self.chunk_tokens}; try {near}"
            )

    @property
    def chunk_blocks(self) -> int:
        """Blocks in one chunk."""
        return self.chunk_tokens // self.block_tokens

    def num_blocks(self, num_tokens: int) -> int:
        """Full blocks in `num_tokens` tokens."""
        return num_tokens // self.block_tokens

    def spans(self, num_tokens: int) -> list[Span]:
        """All full chunks of a prompt of `num_tokens` tokens, then its tail if one full block or more is left."""
        total = self.num_blocks(num_tokens)
        return [self.span_to(min(start + self.chunk_blocks, total)) for start in range(0, total, self.chunk_blocks)]

    def span_to(self, end_block: int) -> Span:
        """The object that ends with `end_block` (exclusive). It begins at the last multiple of a chunk before that, so
        where an object ends says where it begins."""
        return Span((end_block - 1) // self.chunk_blocks * self.chunk_blocks, end_block)


def longest_prefix(hashes: Sequence[bytes], chunk_blocks: int, is_held: Callable[[bytes], bool]) -> list[Span]:
    """What of a prompt is held: the longest run of chunks from its beginning, then the longest tail present.

    hashes: the chain's hash at the end of every full block of the prompt.
    chunk_blocks: blocks in a chunk.
    is_held: whether the object that ends with a hash is there.
    """
    spans: list[Span] = []
    for start in range(0, len(hashes), chunk_blocks):
        stop = min(start + chunk_blocks, len(hashes))
        end = next((end for end in range(stop, start, -1) if is_held(hashes[end - 1])), None)
        if end is None:
            break
        spans.append(Span(start, end))
        if end < start + chunk_blocks:
            break
    return spans


def query_prefix(
    hashes: Sequence[bytes],
    chunk_blocks: int,
    contains_many: Callable[[Sequence[bytes]], Sequence[bool]],
    *,
    elsewhere: Collection[bytes] = (),
    last: bytes | None = None,
) -> dict[bytes, bool]:
    """Ask a store in two questions for what `longest_prefix` needs to know: all chunks, then the tails that could
    follow the run.

    elsewhere: objects that count as held and need not be in this store.
    last: an object that may follow the whole prompt, such as its partial block.
    """
    chunks = hashes[chunk_blocks - 1 :: chunk_blocks]
    known = dict(zip(chunks, contains_many(chunks), strict=True)) if chunks else {}
    run = next((at for at, key in enumerate(chunks) if not known[key] and key not in elsewhere), len(chunks))
    tails = list(hashes[run * chunk_blocks : (run + 1) * chunk_blocks])
    if last is not None and run == len(chunks):
        tails.append(last)
    if tails:
        known.update(zip(tails, contains_many(tails), strict=True))
    return known
