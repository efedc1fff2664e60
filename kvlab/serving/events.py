"""What a running vLLM says of its KV blocks: which are stored, which leave, and in what memory.

vLLM publishes events over ZMQ (``--kv-events-config '{"enable_kv_cache_events": true}'``), as do offloading connectors
for their tiers. `KVEvents` folds them into the tree of prefixes that are held, counts by medium, and the prompts that
were computed. A prompt of which every block was held makes no event: what events tell of reuse is a lower bound.
Nothing of a prompt's tokens is kept.
"""

from collections import Counter
from collections.abc import Iterator
from html import escape
from typing import Any

from kvlab.errors import ConfigError
from kvlab.installed import needed
from kvlab.simulation.traffic import Request, Traffic, checked

# Of versions whose events are lists: the fields after the event's name.
STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
REMOVED = ("block_hashes", "medium")
MOST_PROMPTS = 100_000  # of a trace; what comes later is not in it
SHOWN_BRANCHES = 12


class KVEvents:
    """The state that events describe. `missed` counts batches that were lost on the way, by their sequence numbers;
    `broken` those that could not be read."""

    def __init__(self) -> None:
        self.missed = self.broken = self.block_tokens = 0
        self.counts: dict[str, Counter[str]] = {}  # by medium: stored, removed
        self._held: dict[Any, set[str]] = {}  # block -> the media it lies in
        self._parents: dict[Any, Any] = {}
        self._numbers: dict[Any, int] = {}  # a block's, by hash, for traffic
        self._prompts: list[tuple[float, list[int], Any]] = []  # when, blocks, and the last block's hash
        self._sequence: int | None = None

    def __repr__(self) -> str:
        held = ", ".join(f"{row['medium']} {row['held']:,}" for row in self.rows()) or "none"
        return f"KVEvents(blocks held: {held}; {len(self._prompts):,} prompts; {self.missed:,} batches missed)"

    def take(self, payload: bytes, sequence: int | None = None) -> None:
        """Fold in one published batch. What cannot be read is counted, as it comes from a network."""
        if sequence is not None:
            if self._sequence is not None and sequence > self._sequence + 1:
                self.missed += sequence - self._sequence - 1
            self._sequence = sequence
        try:
            when, events, *_ = needed("msgspec", "kvlab watch").msgpack.decode(payload)
            for event in events:
                self._apply(float(when), _named(event))
        except (ValueError, TypeError, KeyError):  # msgspec's own errors are ValueErrors
            self.broken += 1

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
        start, size = self._prompts[0][0], self.block_tokens
        made = [Request(when - start, size * len(blocks), 0, blocks) for when, blocks, _ in self._prompts]
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

    def _apply(self, when: float, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self._held.clear()
            self._parents.clear()
            return
        if kind not in ("BlockStored", "BlockRemoved"):
            return  # of a later version
        medium, blocks = str(event.get("medium") or "GPU"), list(event["block_hashes"])
        count = self.counts.setdefault(medium, Counter())
        if kind == "BlockRemoved":
            count["removed"] += len(blocks)
            for block in blocks:
                media = self._held.get(block)
                if media is not None:
                    media.discard(medium)
                    if not media:
                        del self._held[block]
                        self._parents.pop(block, None)
            return
        count["stored"] += len(blocks)
        parent = event["parent_block_hash"]
        computed = medium == "GPU" and not event.get("group_idx")
        if computed and blocks:
            self.block_tokens = int(event["block_size"])
            self._remember(when, parent, blocks)
        for block in blocks:
            self._held.setdefault(block, set()).add(medium)
            self._parents.setdefault(block, parent)
            parent = block

    def _remember(self, when: float, parent: Any, blocks: list[Any]) -> None:
        """A prompt whose last blocks are `blocks`. What goes on where the latest prompt ended is more of it: a prompt
        that is computed in pieces, or its answer."""
        if len(self._prompts) >= MOST_PROMPTS:
            return
        numbers = [self._numbers.setdefault(block, len(self._numbers)) for block in blocks]
        for at in range(len(self._prompts) - 1, max(len(self._prompts) - 65, -1), -1):
            began, before, last = self._prompts[at]
            if last == parent and parent is not None:
                self._prompts[at] = (began, before + numbers, blocks[-1])
                return
        chain = []
        while parent is not None and parent in self._numbers:
            chain.append(self._numbers[parent])
            parent = self._parents.get(parent)
        self._prompts.append((when, chain[::-1] + numbers, blocks[-1]))


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
    zmq = needed("zmq", "kvlab watch")
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
                sequence = int.from_bytes(parts[-2], "big") if len(parts) == 3 else None
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
