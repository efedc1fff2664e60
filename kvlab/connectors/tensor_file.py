"""Safetensors files of KV: written whole or not at all, and never in the place of what is no file."""

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvlab.errors import ConfigError, FormatError


def write_file(path: str | Path, tensors: Mapping[str, torch.Tensor], fields: Mapping[str, str]) -> None:
    """Write one file. A link is followed; what a file held before stays until the new content is whole, and its mode
    stays with it. A new file has the mode that the process's umask gives.

    Raises
    ------
    ConfigError
        naming the path: where it is no path, names something that is no regular file, or cannot be written
    """
    named = _path(path)
    try:
        target = Path(os.path.realpath(named))
        before = target.stat() if os.path.lexists(target) else None
        if before is not None and not stat.S_ISREG(before.st_mode):
            raise ConfigError(f"{named} is no regular file, and is not replaced; name a file")
        beside = target.with_name(f".kvlab-{secrets.token_hex(8)}")
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            mode = stat.S_IMODE((before or beside.stat()).st_mode)
            save_file(_apart(tensors), beside, dict(fields))
            os.chmod(beside, mode)  # the library writes a file that is its owner's alone
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"{named} cannot be written: {said}") from error


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, none in the memory of another: the library refuses those."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file and its metadata. What goes wrong with its content, within the block too, is a FormatError; a
    path that names no regular file, or nothing, a ConfigError."""
    named = _path(path)
    try:
        if not stat.S_ISREG(os.stat(named).st_mode):
            raise ConfigError(f"{named} is no regular file; name a file of KV")
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror}") from error
    try:
        with safe_open(named, framework="pt") as file:
            yield file, file.metadata() or {}
    except (FormatError, OSError):
        raise
    except Exception as error:  # safetensors raises its own class on broken files
        raise FormatError(f"{named} is not a readable file of KV: {error!r}"[:300]) from error


def _path(path: object) -> str:
    """`path` as text; ConfigError where it is none."""
    if not isinstance(path, str | Path) or not str(path) or path == "" or "\0" in str(path):
        raise ConfigError(f"a file must be named by a path, text or a Path, got {path!r}"[:200])
    return str(path)
