"""What a running vLLM says of its KV blocks: which are stored, which leave, and in what memory.

vLLM publishes events over ZMQ (``--kv-events-config '{"enable_kv_cache_events": true}'``), as do offloading connectors
for their tiers. `KVEvents` folds them into the tree of prefixes that are held, counts by medium, and the prompts that
were computed. A prompt of which every block was held makes no event: what events tell of reuse is a lower bound.
Nothing of a prompt's tokens is kept.

Events come from a network: a batch is checked as a whole before any of it is folded in.
"""

from collections import Counter
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
LARGEST_BLOCK = 1 << 20  # tokens
LATEST_S = 1e11  # seconds since 1970 that a batch may be of
LONGEST_NAME = 64  # of a medium
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
    """What was computed: when it began, its blocks by number, and the last one's hash."""

    __slots__ = ("began_s", "last", "numbers")

    def __init__(self, began_s: float, numbers: list[int], last: Any) -> None:
        self.began_s, self.numbers, self.last = began_s, numbers, last


class KVEvents:
    """The state that events describe. `taken` counts batches that were read, `missed` those that were lost on the way,
    by their sequence numbers; `broken` those that could not be read, of which nothing is taken. `block_tokens` is that
    of the first prompt; `left_out` counts what is in no trace: prompts and parts of blocks of another size, and those
    beyond a limit."""

    def __init__(self) -> None:
        self.taken = self.missed = self.broken = self.block_tokens = self.left_out = 0
        self.counts: dict[str, Counter[str]] = {}  # by medium: stored, removed
        self._held: dict[Any, set[str]] = {}  # block -> the media it lies in
        self._parents: dict[Any, Any] = {}  # without a circle
        self._children: Counter[Any] = Counter()  # of a block, in `_parents`
        self._numbers: dict[Any, int] = {}  # a block's, by hash, for traffic
        self._prompts: list[_Prompt] = []  # by time
        self._num_blocks = 0  # of all prompts
        self._latest_s = 0.0
        self._sequence: int | None = None

    def __repr__(self) -> str:
        held = ", ".join(f"{row['medium']} {row['held']:,}" for row in self.rows()) or "none"
        return (
            f"KVEvents(blocks held: {held}; {len(self._prompts):,} prompts; {self.missed:,} batches missed, "
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
            self._check_parents(read)
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
        """A row for each medium: blocks held, stored and removed."""
        held = Counter(medium for media in self._held.values() for medium in media)
        return [
            {"medium": medium, "held": held[medium], "stored": count["stored"], "removed": count["removed"]}
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
        made = [Request(p.began_s - start, size * len(p.numbers), 0, list(p.numbers)) for p in self._prompts]
        return checked(Traffic(name, size, made))

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = "<tr><th>medium</th><th>held</th><th>stored</th><th>removed</th></tr>"
        cells = "".join(
            "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
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

    def _check_parents(self, events: list[_Event]) -> None:
        """ValueError where a block would be its own ancestor."""
        new: dict[Any, Any] = {}
        for event in events:
            for block, parent in _chain(event) if isinstance(event, _Stored) else ():
                if parent is not None and self._parents.get(block) is None:
                    new.setdefault(block, parent)
        known = (
            self._parents if any(block in self._children for block in new) else {}
        )  # else none stands behind new ones
        ends: set[Any] = {None}  # from where every walk ends
        for block in new:
            at, seen = block, set()
            while at not in ends:
                if at in seen:
                    raise ValueError("a circle of blocks")
                seen.add(at)
                at = new.get(at, known.get(at))
            ends |= seen

    def _apply(self, event: _Event) -> None:
        if isinstance(event, _Cleared):
            self._held.clear()
            self._parents.clear()
            self._children.clear()
            return
        count = self.counts.setdefault(event.medium, Counter())
        if isinstance(event, _Removed):
            count["removed"] += len(event.blocks)
            for block in event.blocks:
                media = self._held.get(block)
                if media is not None:
                    media.discard(event.medium)
                    if not media:
                        del self._held[block]
                        self._forget_parent(block)
            return
        count["stored"] += len(event.blocks)
        if event.block_tokens and event.blocks:
            self._remember(event)
        for block, parent in _chain(event):
            self._held.setdefault(block, set()).add(event.medium)
            if self._parents.get(block) is None:
                self._parents[block] = parent
                if parent is not None:
                    self._children[parent] += 1

    def _forget_parent(self, block: Any) -> None:
        parent = self._parents.pop(block, None)
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]

    def _remember(self, event: _Stored) -> None:
        """A prompt whose last blocks are those of `event`. What goes on where a late prompt ended is more of it: a
        prompt that is computed in pieces, or its answer."""
        blocks, parent = event.blocks, event.parent
        self.block_tokens = self.block_tokens or event.block_tokens
        full = len(self._prompts) >= MOST_PROMPTS or self._num_blocks + len(blocks) > MOST_BLOCKS
        if full or event.block_tokens != self.block_tokens:
            self.left_out += 1
            return
        numbers = [self._numbers.setdefault(block, len(self._numbers)) for block in blocks]
        if parent is not None:
            for prompt in reversed(self._prompts[-64:]):
                if prompt.last == parent and not set(numbers).intersection(prompt.numbers):
                    prompt.numbers += numbers
                    prompt.last = blocks[-1]
                    self._num_blocks += len(numbers)
                    return
        chain = []
        while parent is not None and parent in self._numbers:
            chain.append(self._numbers[parent])
            parent = self._parents.get(parent)
        self._prompts.append(_Prompt(self._latest_s, chain[::-1] + numbers, blocks[-1]))
        self._num_blocks += len(chain) + len(numbers)


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
    return type(value) is int or isinstance(value, bytes)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
