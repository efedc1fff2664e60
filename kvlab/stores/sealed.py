"""Objects of which nothing is known but their key: what lies there may be anything, and larger than memory."""

from kvlab.container import MAX_HEADER_BYTES, check_length
from kvlab.errors import FormatError, StoreError
from kvlab.hostmemory import aligned
from kvlab.stores.base import Buffer, Store, ValueTooLongError
from kvlab.units import format_bytes

HEAD_BYTES = 8 + MAX_HEADER_BYTES
MOST_BYTES = 4 << 30  # the longest objects of today's models have 1.3 GiB


def read_object(store: Store, key: str, *, most_bytes: int = MOST_BYTES) -> tuple[Buffer | None, FormatError | None]:
    """What was read of the object under `key`: all of it, if it is as long as its header says, else its head, with what
    is wrong. None if there is nothing. StoreError where it has more than `most_bytes`."""
    head, size = store.get_head(key, HEAD_BYTES), store.size_of(key)
    if head is None or size is None:
        return None, None
    try:
        check_length(bytes(head), size, key)
        if size > most_bytes:
            large, limit = format_bytes(size), format_bytes(most_bytes)
            raise StoreError(f"object {key!r} of {large} is not read: the limit is {limit}", reason="too_large")
        memory = aligned(size)
        length = store.get_into(key, memory)
    except FormatError as error:
        return head, error
    except ValueTooLongError:
        return head, FormatError(f"object {key!r} grew while it was read", reason="too_large")
    return None if length is None else memory[:length], None
