"""Texts for the serde benchmarks: ShareGPT conversations (read as far as the file goes) and Python's own source."""

import argparse as _argparse
import ast
import inspect
import json
import typing
from pathlib import Path

from kvlab.connectors.transformers import tokenize


def sharegpt(path: Path, count: int, min_chars: int = 6000) -> list[str]:
    """`count` long conversations; the file may break off anywhere."""
    decoder, found = json.JSONDecoder(), []
    with path.open(encoding="utf-8") as source:
        raw = source.read(60 * count * min_chars)
    at = raw.index("[") + 1
    while len(found) < count:
        while raw[at] in " ,\r\n\t":
            at += 1
        try:
            conversation, at = decoder.raw_decode(raw, at)
        except (json.JSONDecodeError, IndexError):
            break
        text = "\n\n".join(turn["value"] for turn in conversation["conversations"])
        if len(text) >= min_chars:
            found.append(text)
    if len(found) < count:
        raise SystemExit(f"{path.name} holds only {len(found)} conversations of {min_chars} characters")
    return found


def code(count: int) -> list[str]:
    """`count` pieces of Python source from the standard library."""
    whole = "".join(inspect.getsource(module) for module in (_argparse, ast, typing, inspect))
    return [whole[start : start + 12_000] for start in range(0, count * 25_000, 25_000)]


def token_rows(model: str, texts: list[str], length: int) -> list[list[int]]:
    """The first `length` token ids of each text."""
    rows = [tokenize(model, text)[:length] for text in texts]
    short = [len(row) for row in rows if len(row) < length]
    if short:
        raise SystemExit(f"a text has only {min(short)} tokens, {length} are needed")
    return rows
