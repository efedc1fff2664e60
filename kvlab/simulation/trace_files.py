"""Read and write request traces: JSON lines with one prompt's block hashes each.

Two published formats are known; their fields say which one a file has:

- *mooncake* (github.com/kvcache-ai/Mooncake, FAST25-release): ``timestamp`` in ms, ``input_length``,
  ``output_length``, ``hash_ids`` of 512-token blocks, the last of which may be partly filled.
- *bailian* (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): ``timestamp`` in s, the same lengths,
  ``chat_id``, ``parent_chat_id``, ``type``, ``turn``, ``hash_ids`` of 16-token blocks.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError, FormatError
from kvlab.simulation.traffic import Chain, Request, Traffic, checked

FORMATS = {"mooncake": (512, 1e-3), "bailian": (16, 1.0)}  # name -> (tokens per block, seconds per timestamp unit)
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
_MAY = ("loads", "saves")  # written where they are false


def load_traffic(
    path: str | Path, format: str = "auto", *, block_tokens: int | None = None, limit: int | None = None
) -> Traffic:
    """Read a trace, checking every line.

    Parameters
    ----------
    format
        ``mooncake``, ``bailian``, or ``auto``: a first line with a ``chat_id`` is bailian's.
    block_tokens
        tokens per block, where it is not the format's own (512, 16).
    limit
        stop after so many requests.

    Raises
    ------
    FormatError
        naming file, line, field and value
    ConfigError
        for a file that is not there, or of an unknown format
    """
    file = Path(path)
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format must be auto, {' or '.join(FORMATS)}; got {format!r}")
    if not file.is_file():
        raise ConfigError(
            f"no trace at {str(path)!r}; give a JSON-lines file, or chat, agent or document: made-up traffic"
        )
    chain, requests, before = Chain(), [], -math.inf
    unit = 0.0
    for where, row in _rows(file):
        if not unit:
            format = ("bailian" if "chat_id" in row else "mooncake") if format == "auto" else format
            own_block_tokens, unit = FORMATS[format]
            block_tokens = block_tokens or own_block_tokens
        request = _request(row, where, block_tokens or 0, unit, chain)
        if request.arrival_s < before:
            raise FormatError(
                f"{where}: timestamp {row['timestamp']} is before the one above it; sort the trace by time"
            )
        before = request.arrival_s
        requests.append(request)
        if limit is not None and len(requests) >= limit:
            break
    if not requests or not block_tokens:
        raise FormatError(f"{file.name} holds no request")
    return checked(Traffic(file.stem, block_tokens, requests))


def save_traffic(traffic: Traffic, path: str | Path) -> None:
    """Write `traffic` in Mooncake's form; its block size is not part of it: give it again when loading. A prompt that a
    cache may not serve, or not keep, has ``"loads": false`` or ``"saves": false`` beside."""
    with open(path, "w") as file:
        for request in traffic.requests:
            row: dict[str, Any] = {
                "timestamp": round(request.arrival_s * 1000),
                "input_length": request.num_tokens,
                "output_length": request.output_tokens,
                "hash_ids": request.block_ids,
            }
            row |= {name: False for name in _MAY if not getattr(request, name)}
            file.write(json.dumps(row) + "\n")


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.name} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise FormatError(f"{where} is not JSON of a request: it is nested too deeply") from None
            except json.JSONDecodeError as error:
                hint = (
                    "; it is a pointer of Git LFS, fetch the file" if line.startswith("version https://git-lfs") else ""
                )
                raise FormatError(f"{where} is not JSON: {error.msg} at column {error.colno}{hint}") from None
            if not isinstance(row, dict):
                raise FormatError(f"{where} must be a JSON object, got {type(row).__name__}")
            missing = [name for name in _FIELDS if name not in row]
            if missing:
                raise FormatError(f"{where} lacks {', '.join(missing)}; a request has {', '.join(_FIELDS)}")
            yield where, row


def _request(row: dict[str, Any], where: str, block_tokens: int, unit: float, chain: Chain) -> Request:
    stamp, ids = row["timestamp"], row["hash_ids"]
    if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not math.isfinite(stamp) or stamp < 0:
        raise FormatError(f"{where}: timestamp must be a number of 0 or more, got {stamp!r}")
    for name, least in (("input_length", 1), ("output_length", 0)):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FormatError(f"{where}: {name} must be an integer of {least} or more, got {value!r}")
    if not isinstance(ids, list) or not all(type(block) is int or isinstance(block, str) for block in ids):
        raise FormatError(f"{where}: hash_ids must be a list of integers or strings, got {str(ids)[:40]}")
    for name in _MAY:
        if not isinstance(row.get(name, True), bool):
            raise FormatError(f"{where}: {name} must be true or false, got {row[name]!r}")
    full, rest = divmod(row["input_length"], block_tokens)
    if len(ids) not in (full, full + (rest > 0)):
        raise FormatError(
            f"{where}: {row['input_length']} tokens are {full + (rest > 0)} blocks of {block_tokens}, "
            f"but hash_ids has {len(ids)}; is block_tokens right?"
        )
    may = {name: row.get(name, True) for name in _MAY}
    return Request(stamp * unit, row["input_length"], row["output_length"], chain.number(ids), **may)


def find_traces() -> dict[str, Path]:
    """Trace files by name, in the folder ``$KVLAB_TRACES``; none if it is not set."""
    folder = os.environ.get("KVLAB_TRACES")
    return {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))} if folder else {}
