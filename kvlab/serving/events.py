"""What a running vLLM says of its KV blocks: which are stored, which leave, and in what memory.

vLLM publishes events over ZMQ (``--kv-events-config '{"enable_kv_cache_events": true}'``), as do offloading connectors
for their tiers. `KVEvents` folds them into the tree of prefixes that are held, counts by medium, and the prompts that
were computed. A prompt of which every block was held makes no event: what events tell of reuse is a lower bound.
Nothing of a prompt's tokens is kept.

Events come from a network: a batch is checked as a whole before any of it is folded in.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

from kvlab.errors import ConfigError
from kvlab.installed import needed
from kvlab.simulation.traffic import Request, Traffic, checked

# Of versions whose events are lists: the fields after the event's name.
STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
REMOVED = ("block_hashes", "medium")
MOST_PROMPTS, MOST_BLOCKS = 100_000, 10_000_000  # of a trace; what comes later is not in it
MOST_NAMED = 2_000_000  # different blocks of a trace
MOST_HELD = 1_000_000  # blocks; of more, the oldest are forgotten
MOST_MEDIA = 8  # kept apart by name; vLLM has three
LARGEST_BLOCK = 1 << 20  # tokens
LATEST_S = 1e11  # seconds since 1970 that a batch may be of
LONGEST_NAME = 64  # of a medium
LONGEST_HASH = 64  # bytes
SHOWN_NAME = 24  # letters of it
OTHERS = "others"  # media beyond `MOST_MEDIA`
SHOWN_BRANCHES = 12


class _Stored(NamedTuple):
    medium: str
    blocks: list[int | bytes]
    parent: int | bytes | None
    block_tokens: int  # 0 where it is no prompt's: a copy in a tier, or a further KV cache group


class _Removed(NamedTuple):
    medium: str
    blocks: list[int | bytes]


class _Cleared(NamedTuple):
    pass


_Event = _Stored | _Removed | _Cleared


class _Prompt:
    """What was computed: when it began, and the number of its last block."""

    __slots__ = ("began_s", "last")

    def __init__(self, began_s: float, last: int) -> None:
        self.began_s, self.last = began_s, last


class _Blocks:
    """Blocks of a trace by number, each behind one of a lower number: so a walk to the first block ends."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}  # by hash, the latest
        self._above = array("q")  # the number of the block before; -1: none is known
        self._depths = array("q")  # blocks from the first to this one

    def __len__(self) -> int:
        return len(self._above)

    def number(self, block: Any) -> int:
        """-1 where it is not known."""
        return self._numbers.get(block, -1)

    def depth(self, number: int) -> int:
        return self._depths[number] if number >= 0 else 0

    def add(self, block: Any, above: int) -> int:
        """The number of `block` behind `above`: a new one where it stood elsewhere before, as its first blocks may have
        been stored before the watch began."""
        number = self._numbers.get(block, -1)
        if number < 0 or self._above[number] != above:
            number = self._numbers[block] = len(self._above)
            self._above.append(above)
            self._depths.append(self.depth(above) + 1)
        return number

    def chain(self, number: int) -> list[int]:
        """All numbers from the first block to this one."""
        chain = []
        while number >= 0:
            chain.append(number)
            number = self._above[number]
        return chain[::-1]


class KVEvents:
    """The state that events describe. `taken` counts batches that were read, `missed` those that were lost on the way,
    by their sequence numbers; `broken` those that could not be read, of which nothing is taken. `block_tokens` is that
    of the first prompt; `left_out` counts what is in no trace: prompts and parts of blocks of another size, and those
    beyond a limit. `forgotten` counts blocks that may be held and are forgotten, the oldest beyond `MOST_HELD`."""

    def __init__(self) -> None:
        self.taken = self.missed = self.broken = self.block_tokens = self.left_out = self.forgotten = 0
        self.counts: dict[str, Counter[str]] = {}  # by medium: held, stored, removed
        self._held: OrderedDict[Any, int] = OrderedDict()  # block -> a bit for each medium it lies in; the oldest first
        self._bits: dict[str, int] = {}  # of the media
        self._parents: dict[Any, Any] = {}  # of blocks that are held; without a circle
        self._children: Counter[Any] = Counter()  # of a block, in `_parents`
        self._blocks = _Blocks()  # of prompts
        self._prompts: list[_Prompt] = []  # by time
        self._num_blocks = 0  # of all prompts
        self._latest_s = 0.0
        self._sequence: int | None = None

    def __repr__(self) -> str:
        held = ", ".join(f"{_shown(row['medium'])} {row['held']:,}" for row in self.rows()) or "none"
        forgotten = f", {self.forgotten:,} forgotten" if self.forgotten else ""
        return (
            f"KVEvents(blocks held: {held}{forgotten}; {len(self._prompts):,} prompts; {self.missed:,} batches missed, "
            f"{self.broken:,} unreadable)"
        )

    def take(self, payload: bytes, sequence: int | None = None) -> None:
        """Fold in one published batch. What cannot be read is counted, as it comes from a network."""
        try:
            when, events, *_ = needed("msgspec").msgpack.decode(payload)
            if not _is_number(when) or not 0 <= when <= LATEST_S:
                raise ValueError("no time")
            if sequence is not None and not 0 <= sequence < 1 << 64:
                raise ValueError("no sequence number")
            read = [found for event in events if (found := _read(_named(event))) is not None]
            _check_parents(read)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # msgspec's own are ValueErrors
            self.broken += 1
            return
        if sequence is not None:
            if self._sequence is not None and sequence > self._sequence + 1:
                self.missed += sequence - self._sequence - 1
            self._sequence = sequence
        self.taken += 1
        self._latest_s = max(self._latest_s, float(when))  # clocks are set back; a trace goes forward
        for event in read:
            self._apply(event)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each medium: blocks held, stored and removed. Its name is as it came from the network, in at most
        64 letters; media beyond the first eight are one row, ``others``."""
        return [
            {"medium": medium, "held": count["held"], "stored": count["stored"], "removed": count["removed"]}
            for medium, count in sorted(self.counts.items())
        ]

    def branches(self) -> list[dict[str, int]]:
        """Prefixes that begin differently, the largest first: blocks held under each, and the longest chain."""
        depth: dict[Any, tuple[Any, int]] = {}

        def root_of(block: Any) -> tuple[Any, int]:
            chain = []
            while block not in depth and self._parents.get(block) in self._held:
                chain.append(block)
                block = self._parents[block]
            root, length = depth.setdefault(block, (block, 1))
            for each in reversed(chain):
                length += 1
                depth[each] = (root, length)
            return root, length

        sizes: Counter[Any] = Counter()
        longest: Counter[Any] = Counter()
        for block in self._held:
            root, length = root_of(block)
            sizes[root] += 1
            longest[root] = max(longest[root], length)
        return [{"blocks": count, "longest": longest[root]} for root, count in sizes.most_common()]

    def traffic(self, name: str = "watched") -> Traffic:
        """The prompts that were computed, as traffic for `kvlab.simulate`: a lower bound of reuse. ConfigError where
        nothing was."""
        if not self._prompts:
            raise ConfigError("no prompt was seen: are KV events on, and is the endpoint the engine's?")
        start, size = self._prompts[0].began_s, self.block_tokens
        chains = [self._blocks.chain(prompt.last) for prompt in self._prompts]
        made = [
            Request(prompt.began_s - start, size * len(chain), 0, chain)
            for prompt, chain in zip(self._prompts, chains, strict=True)
        ]
        return checked(Traffic(name, size, made))

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "<tr><th>medium</th><th>held</th><th>stored</th><th>removed</th></tr>"
        cells = "".join(
            "<tr>" + "".join(f"<td>{escape(_shown(value))}</td>" for value in row.values()) + "</tr>" for row in rows
        )
        branches = self.branches()
        most = max((each["blocks"] for each in branches), default=1)
        bars = "".join(
            f"<div style='background:#3b6ea8;height:10px;margin:2px;width:{100 * each['blocks'] / most:.1f}%'></div>"
            f"<small>{each['blocks']:,} blocks, longest chain {each['longest']:,}</small>"
            for each in branches[:SHOWN_BRANCHES]
        )
        more = f"<p>and {len(branches) - SHOWN_BRANCHES:,} more</p>" if len(branches) > SHOWN_BRANCHES else ""
        return f"<div style='max-width:640px'><p>{escape(repr(self))}</p><table>{head}{cells}</table>{bars}{more}</div>"

    # ----

    def _apply(self, event: _Event) -> None:
        if isinstance(event, _Cleared):
            self._held.clear()
            self._parents.clear()
            self._children.clear()
            for count in self.counts.values():
                count["held"] = 0
            return
        medium = event.medium if event.medium in self.counts or len(self.counts) < MOST_MEDIA else OTHERS
        count = self.counts.setdefault(medium, Counter())
        bit = self._bits.setdefault(medium, 1 << len(self._bits))
        if isinstance(event, _Removed):
            count["removed"] += len(event.blocks)
            for block in event.blocks:
                media = self._held.get(block, 0)
                if media & bit:
                    count["held"] -= 1
                    self._held[block] = media & ~bit
                    if media == bit:
                        del self._held[block]
                        self._forget_parent(block)
            return
        count["stored"] += len(event.blocks)
        if event.block_tokens and event.blocks:
            self._remember(event)
        for block, parent in _chain(event):
            media = self._held.get(block, 0)
            count["held"] += not media & bit
            self._held[block] = media | bit
            # One that comes after its children begins a branch: so no block is its own ancestor.
            if self._parents.get(block) is None and block not in self._children:
                self._parents[block] = parent
                if parent is not None:
                    self._children[parent] += 1
        while len(self._held) > MOST_HELD:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        block, media = self._held.popitem(last=False)
        self._forget_parent(block)
        self.forgotten += 1
        for medium, bit in self._bits.items():
            self.counts[medium]["held"] -= bool(media & bit)

    def _forget_parent(self, block: Any) -> None:
        parent = self._parents.pop(block, None)
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]

    def _remember(self, event: _Stored) -> None:
        """A prompt whose last blocks are those of `event`. What goes on where a late prompt ended is more of it: a
        prompt that is computed in pieces, or its answer."""
        self.block_tokens = self.block_tokens or event.block_tokens
        above = self._blocks.number(event.parent) if event.parent is not None else -1
        late = self._prompts[-64:] if above >= 0 else []
        grown = next((prompt for prompt in reversed(late) if prompt.last == above), None)
        more = len(event.blocks) + (self._blocks.depth(above) if grown is None else 0)
        is_full = (
            len(self._prompts) >= MOST_PROMPTS
            or self._num_blocks + more > MOST_BLOCKS
            or len(self._blocks) + len(event.blocks) > MOST_NAMED
        )
        if is_full or event.block_tokens != self.block_tokens:
            self.left_out += 1
            return
        for block in event.blocks:
            above = self._blocks.add(block, above)
        self._num_blocks += more
        if grown is None:
            self._prompts.append(_Prompt(self._latest_s, above))
        else:
            grown.last = above


def watch(endpoint: str = "tcp://127.0.0.1:5557", *, topic: str = "", wait_s: float = 1.0) -> Iterator[KVEvents]:
    """The state, again after each batch of events, and each `wait_s` seconds without one. The same object each time.

    Parameters
    ----------
    endpoint, topic
        as in vLLM's ``--kv-events-config``, with a host in the place of ``*``

    Raises
    ------
    ConfigError
        for an endpoint that cannot be one
    """
    zmq = needed("zmq")
    state = KVEvents()
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"{endpoint!r} is no endpoint, write tcp://host:port: {error}") from error
        while True:
            if socket.poll(int(wait_s * 1000)):
                parts = socket.recv_multipart()
                sequence = int.from_bytes(parts[1], "big") if len(parts) == 3 and len(parts[1]) <= 8 else None
                state.take(parts[-1], sequence)
            yield state
    finally:
        socket.close(linger=0)
        context.term()


def _shown(value: object) -> str:
    """What came from the network, without what would upset a terminal, in few letters."""
    text = str(value)
    text = text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode()
    return text if len(text) <= SHOWN_NAME else f"{text[: SHOWN_NAME - 3]}..."


def _check_parents(events: list[_Event]) -> None:
    """ValueError where a block would be its own ancestor, by what these events say."""
    new: dict[Any, Any] = {}
    for event in events:
        for block, parent in _chain(event) if isinstance(event, _Stored) else ():
            if parent is not None:
                new.setdefault(block, parent)
    ends: set[Any] = {None}  # from where every walk ends
    for block in new:
        at, seen = block, set()
        while at not in ends:
            if at in seen:
                raise ValueError("a circle of blocks")
            seen.add(at)
            at = new.get(at)
        ends |= seen


def _named(event: Any) -> dict[str, Any]:
    """An event as a mapping; some versions of vLLM publish lists."""
    if isinstance(event, dict):
        return event
    kind, *values = event
    fields = {"BlockStored": STORED, "BlockRemoved": REMOVED}.get(kind, ())
    return {"type": kind, **dict(zip(fields, values, strict=False))}


def _read(event: dict[str, Any]) -> _Event | None:
    """An event whose parts are of the kinds that they must be; None for those of later versions. ValueError, TypeError
    or KeyError where they are not."""
    kind = event["type"]
    if kind == "AllBlocksCleared":
        return _Cleared()
    if kind not in ("BlockStored", "BlockRemoved"):
        return None
    medium, blocks = event.get("medium") or "GPU", event["block_hashes"]
    if not isinstance(medium, str) or len(medium) > LONGEST_NAME:
        raise ValueError("no medium")
    if not isinstance(blocks, list) or not all(map(_is_hash, blocks)):
        raise ValueError("no block hashes")
    if kind == "BlockRemoved":
        return _Removed(medium, blocks)
    parent = event["parent_block_hash"]
    if (parent is not None and not _is_hash(parent)) or len({*blocks, parent}) != len(blocks) + 1:
        raise ValueError("no parent, or a block twice")
    size = 0
    if medium == "GPU" and not event.get("group_idx"):
        size = event["block_size"]
        if type(size) is not int or not 1 <= size <= LARGEST_BLOCK:
            raise ValueError("no block size")
    return _Stored(medium, blocks, parent, size)


def _chain(event: _Stored) -> Iterator[tuple[Any, Any]]:
    """Each block with the one that it stands behind, as far as the event tells. Blocks of a window, which an engine
    leaves out, may lie between the two. Tiers that name no parent copy blocks of several prompts in one event."""
    if event.parent is None and event.medium != "GPU":
        return zip(event.blocks, [None] * len(event.blocks), strict=True)
    return zip(event.blocks, [event.parent, *event.blocks[:-1]], strict=True)


def _is_hash(value: object) -> bool:
    return type(value) is int or (isinstance(value, bytes) and len(value) <= LONGEST_HASH)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
