"""Which objects of a prompt the tiers hold, and why the first that is missing is."""

from collections.abc import Callable, Sequence

from kvlab.chunking import longest_prefix, query_prefix
from kvlab.errors import KVLabError
from kvlab.hashing import Namespace, versioned
from kvlab.stores import Store
from kvlab.tierworker.link import Message
from kvlab.tierworker.messages import Ask

PIECE = 1024  # keys between looks at whether the answer is still wanted
MOST_LOOKUPS = 4 << 20  # keys of one question: those of 256 ranks for a prompt of 4 million tokens


class UnwantedError(Exception):
    """The session has ended, and its questions with it."""


def answer(
    ask: Ask,
    hashes: Sequence[bytes],
    last: bytes | None,
    in_memory: bytes,
    *,
    store: Store,
    namespaces: Sequence[Namespace],
    is_unfit: Callable[[str], bool],
    is_wanted: Callable[[], bool],
) -> tuple[Message, bytes]:
    """The answer to what `ask_of` read. `is_unfit` says of a key that its object is of no use to this engine.
    UnwantedError once it is not `is_wanted`."""
    step = ask.chunk_blocks
    if (ask.num_hashes // step + min(step, ask.num_hashes)) * len(namespaces) > MOST_LOOKUPS:
        return {"op": "answer", "id": ask.id, "error": f"a question is for more than {MOST_LOOKUPS} objects"}, b""
    namespaces = [versioned(namespace, ask.version) for namespace in namespaces]
    elsewhere = frozenset(key for key, there in zip(hashes, in_memory, strict=True) if there)

    def contains_many(keys: Sequence[bytes]) -> list[bool]:
        """Under every rank's namespace."""
        held: list[bool] = []
        for at in range(0, len(keys), PIECE):
            piece = keys[at : at + PIECE]
            held += [True] * len(piece)
            for namespace in namespaces:
                if not is_wanted():
                    raise UnwantedError
                names = [namespace.key(key) for key in piece]
                for index, (name, there) in enumerate(zip(names, store.contains_many(names), strict=True), at):
                    held[index] &= there and not is_unfit(name)
        return held

    try:
        known = query_prefix(hashes, step, contains_many, elsewhere=elsewhere, last=last)
    except UnwantedError:
        raise
    except BaseException as error:  # a store of another package may raise what is no Exception
        reason = str(error) if isinstance(error, KVLabError) else f"a store raised {type(error).__name__}"
        return {"op": "answer", "id": ask.id, "error": reason}, b""
    spans = longest_prefix(hashes, step, lambda key: key in elsewhere or known.get(key, False))
    end = spans[-1].end_block if spans else 0
    wanted = hashes[end : end - end % step + step]  # the rest of the chunk behind the hit
    why = why_missing(store, namespaces[0].key(wanted[-1])) if wanted else ""
    flags = bytes(_flag(known, key) for key in [*hashes, *([] if last is None else [last])])
    return {"op": "answer", "id": ask.id, "missing": why, "at": end + len(wanted) - 1}, flags


def why_missing(store: Store, key: str) -> str:
    """As the store says, or what it raised."""
    try:
        return str(store.why_missing(key))
    except BaseException as error:  # as above
        return f"raised_{type(error).__name__}"


def _flag(known: dict[bytes, bool], key: bytes) -> int:
    """Of a hash in an answer: 0 was not asked for, 1 is missing, 2 is there."""
    return 0 if key not in known else 1 + bool(known[key])
