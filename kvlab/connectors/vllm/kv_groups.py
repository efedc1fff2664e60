"""Which blocks of a prompt each group of layers still needs, and so which an object holds.

vLLM puts layers that see the whole prefix and layers that see a window into groups of their own: each group has its own
table of blocks, all take their blocks from one pool, and those that a window has left behind are given back while the
prompt is still being computed. What an object holds must follow from its place alone, as other processes read it too.

A group of recurrent layers has a page for the state behind a block's last token: one page is all that a later token
sees. That is a window of two tokens, so an object holds of it the page of its last block. But a state is right for one
number of tokens alone, so a hit ends where an object ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from kvlab.chunking import Chunker, Span

Tables: TypeAlias = Sequence[Sequence[int]]  # the page of each block of a request, for each group
STATE_WINDOW = 2  # as the window of a group that holds recurrent states
NO_PAGE = 0  # stands in a table for a page that was given back (NULL_BLOCK_ID in vllm/v1/core/block_pool.py)


class Part(NamedTuple):
    """Blocks [first_block, end_block) of one group, in an object's slots from `offset` on."""

    group: int
    first_block: int
    end_block: int
    offset: int


@dataclass(frozen=True)
class KVGroups:
    """`windows` has an entry for each group: how many tokens a token sees, itself included; None: all before it.
    Groups of `recurrent` hold states. `ahead`: tokens behind an object that its KV follows from too, see `draft_ahead`.
    """

    windows: tuple[int | None, ...]
    block_tokens: int
    recurrent: frozenset[int] = frozenset()
    ahead: int = 0

    @property
    def are_several(self) -> bool:
        return len(self.windows) > 1

    @property
    def have_windows(self) -> bool:
        return any(self.windows)

    @property
    def fail_whole(self) -> bool:
        """Whether a load that lost a page is lost as a whole. Told of the page alone, the engine computes from there on
        and reads what is before: of several groups it cannot tell which one lost the page, and under a window it was
        given no pages before those that the hit's end sees."""
        return self.are_several or self.have_windows

    def chunker(self, chunk_tokens: int) -> Chunker:
        """Cuts prompts into objects of `chunk_tokens`. With states, chunks are whole blocks at least: the engine makes
        a block as long as its page must be to hold a state, which is not known before it starts."""
        if self.recurrent:
            chunk_tokens = -(-chunk_tokens // self.block_tokens) * self.block_tokens
        return Chunker(chunk_tokens=chunk_tokens, block_tokens=self.block_tokens)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks in which an object of so long a prompt may end. With states, the last token is none of it: it is left
        to compute, and no hit ends one token before an object does. Nor are the tokens `ahead` of an object."""
        return max(num_tokens - max(self.ahead, bool(self.recurrent)), 0) // self.block_tokens

    def shows_gap(self, block_ids: Tables, num_tokens: int) -> bool:
        """Whether a page is missing that the token behind `num_tokens` computed ones sees: what is computed then is not
        the prompt's KV."""
        used = -(-num_tokens // self.block_tokens)
        return any(
            NO_PAGE in table[self.first_block(group, num_tokens) : used] for group, table in enumerate(block_ids)
        )

    def first_block(self, group: int, num_tokens: int) -> int:
        """The first block that the token behind `num_tokens` computed ones sees. The engine keeps it and what follows,
        and loads nothing before it (get_num_skipped_tokens in vllm/v1/core/single_type_kv_cache_manager.py)."""
        window = self.windows[group]
        return 0 if window is None else max(num_tokens - window + 1, 0) // self.block_tokens

    def parts(self, span: Span, end_token: int) -> list[Part]:
        """What the object of `span` holds, which ends with token `end_token` of the prompt.

        Of a group with a window, only what the object's own last token sees. That serves a hit that ends with the
        object, or one token before it, which is left to compute; one that ends later sees less of it. And the engine
        has not given it back when the object is saved: the step that computed that last token had to see it too.
        """
        parts: list[Part] = []
        offset = 0
        for group in range(len(self.windows)):
            first = max(span.first_block, self.first_block(group, end_token - 1))
            parts.append(Part(group, first, span.end_block, offset))
            offset += span.end_block - first
        return parts

    def num_slots(self, span: Span, end_token: int) -> int:
        """Blocks of all groups in an object."""
        return sum(part.end_block - part.first_block for part in self.parts(span, end_token))

    def pages(
        self, span: Span, end_token: int, block_ids: Tables, before: int, states: Mapping[int, int] | None = None
    ) -> tuple[int, ...]:
        """The pages of an object's slots, at the end of a step that began with `before` tokens computed; () if the
        engine has given some of them back. `states`: the page of each recurrent group's state behind the object."""
        found: list[int] = []
        for part in self.parts(span, end_token):
            if part.group in self.recurrent:
                if not states or part.group not in states:
                    return ()
                found.append(states[part.group])
                continue
            pages = block_ids[part.group][part.first_block : part.end_block]
            if (
                part.first_block < self.first_block(part.group, before)
                or len(pages) < part.end_block - part.first_block
                or NO_PAGE in pages
            ):
                return ()
            found += pages
        return tuple(found)

    def pick(
        self, span: Span, end_token: int, slots: Sequence[int], block_ids: Tables, blocks: range, hit_tokens: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which slots of an object go to which pages, where `blocks` of it are filled for a hit of `hit_tokens`."""
        picked: list[int] = []
        pages: list[int] = []
        for part in self.parts(span, end_token):
            first = max(part.first_block, blocks.start, self.first_block(part.group, hit_tokens))
            end, skip = max(min(part.end_block, blocks.stop), first), part.offset - part.first_block
            picked += slots[first + skip : end + skip]
            pages += block_ids[part.group][first:end]
        return tuple(picked), tuple(pages)

    def needed(self, block_ids: Tables, blocks: range, hit_tokens: int) -> list[int]:
        """All pages of `blocks` that a hit of `hit_tokens` fills."""
        return [
            page
            for group, table in enumerate(block_ids)
            for page in table[max(blocks.start, self.first_block(group, hit_tokens)) : blocks.stop]
        ]
