"""Sizes and counts as people write them: ``14MiB`` <-> 14680064, ``32k`` <-> 32768."""

import re

from kvlab.errors import ConfigError

_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"b": 1, "": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes named by `text`: an int, or a number with B, KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000).

    >>> parse_bytes("14MiB")
    14680064
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = match[2].lower() if match else None
    factor = {**_DECIMAL, **_BINARY}.get(unit) if unit is not None else None
    if match is None or factor is None or len(match[1]) > 20:
        raise ConfigError(f"size must be a number of bytes or like 512MiB, 10GiB, 1.5GB; got {text!r}")
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` for people, binary units, at most two decimals.

    >>> format_bytes(14680064)
    '14 MiB'
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.2f}".rstrip("0").rstrip(".") + f" {unit}"
        size /= 1024
    return f"{size:.2f}".rstrip("0").rstrip(".") + " TiB"


def parse_tokens(text: str | int) -> int:
    """A count of tokens; ``k`` and ``M`` are 1024 and 1024**2, as context lengths are named.

    >>> parse_tokens("32k")
    32768
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"a number of tokens must be like 4096, 32k or 1M; got {text!r}")
    return int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]
