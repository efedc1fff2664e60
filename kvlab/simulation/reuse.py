"""How far apart are two uses of the same block? The histogram that says what capacity buys."""

import numpy as np
import numpy.typing as npt

from kvlab.simulation.traffic import Traffic

Ints = npt.NDArray[np.int64]


def reuse_distances(traffic: Traffic) -> Ints:
    """For every block access, how many other blocks were used since, when its prompt comes; -1 for first uses.

    Shape [accesses], each prompt from its last block to its first, the order in which the engine renews them.
    An LRU cache of C blocks answers those with a distance below C, if it can hold every single prompt. (Mattson
    et al., "Evaluation techniques for
    storage hierarchies", IBM Systems Journal 9(2), 1970.)
    """
    accesses = np.concatenate([np.array(request.block_ids[::-1], np.int64) for request in traffic.requests])
    order = np.argsort(accesses, kind="stable")
    same = accesses[order][1:] == accesses[order][:-1]
    previous = np.full(len(accesses), -1, np.int64)
    previous[order[1:][same]] = order[:-1][same]
    # Of the accesses in between, those whose own last use also lies in between are repeats, not other blocks.
    repeats = _larger_before(previous)
    # Those of the prompt itself, deeper ones all, have not been renewed yet when it is looked up.
    of_this_prompt = np.concatenate([np.arange(len(request.block_ids)) for request in traffic.requests])
    distances: Ints = np.arange(len(accesses)) - previous - 1 - repeats - of_this_prompt
    return np.where(previous < 0, -1, distances)


def reuse_histogram(traffic: Traffic) -> list[dict[str, int | float]]:
    """Rows (from_blocks, below_blocks, accesses, share) in powers of two; the first row, 0 to 0, are first uses."""
    distances = reuse_distances(traffic)
    total = len(distances)
    first = int((distances < 0).sum())
    rows: list[dict[str, int | float]] = [
        {"from_blocks": 0, "below_blocks": 0, "accesses": first, "share": first / total}
    ]
    low, high = 0, 1
    while (distances >= low).any():
        count = int(((distances >= low) & (distances < high)).sum())
        rows.append({"from_blocks": low, "below_blocks": high, "accesses": count, "share": count / total})
        low, high = high, high * 2
    return rows


def _larger_before(values: Ints) -> Ints:
    """For each value, how many earlier ones are larger: merge sort, all merges of a level at once."""
    count = len(values)
    width = 1 << max(count - 1, 1).bit_length()
    ranks = np.full(width, -1, np.int64)  # the padding comes last and is never larger
    ranks[:count] = np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1
    # Only first uses share a value, and their counts are not read.
    larger = np.zeros(width, np.int64)
    half = 1
    while half < width:
        pairs = ranks.reshape(-1, 2, half)
        row_shift = (np.arange(len(pairs)) * (count + 2))[:, None]
        left = np.sort(pairs[:, 0], axis=1) + row_shift
        right = pairs[:, 1] + row_shift
        not_larger = np.searchsorted(left.ravel(), right.ravel(), side="right") - np.repeat(
            np.arange(len(pairs)) * half, half
        )
        larger.reshape(-1, 2, half)[:, 1] += (half - not_larger).reshape(-1, half)
        half *= 2
    return larger[:count]
