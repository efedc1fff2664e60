"""Which weights are these? A BLAKE3 digest over every byte of a model's or an adapter's files.

Two models that differ in one byte must not share a namespace, so nothing is sampled. A file is read in pieces by one
thread per core; its digest is BLAKE3 over the digests of its pieces, and a fingerprint is BLAKE3 over the name, size
and digest of each file. Pieces are hashed with BLAKE3, or, where `fast`, with 128 bits of XXH3: less than half the
work, and chance takes two models for one as rarely. But a second file with the XXH3 of a first can be made on purpose,
so `fast` is for a model that the operator chose, not for adapters, which may come from tenants.

Digests are kept in the user's cache, so that a second start reads nothing. An entry counts for one state of one file
(path, device, inode, size, times of the last change of content and of inode). The cache is believed only where
the user alone can write to it, and only for files on file systems whose times can be relied on. The names of blobs
in a hub cache are not used: they say what was downloaded once, not what the file holds now.
"""

import ctypes
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from blake3 import blake3
from xxhash import xxh3_128

from kvlab.errors import ConfigError
from kvlab.system import fcntl, num_cores

FORMATS = {False: "kvlab-files/blake3/1", True: "kvlab-files/xxh3/1"}  # by `fast`; part of every digest
PIECE_BYTES = 32 << 20
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors"})
# A file changed this recently may change again and show no other time: within one tick of its file system's clock, or
# through a mapping of a page that is still to be written back, which the system does within half a minute.
RACY_NS = 60 * 10**9
# Magic numbers of the file systems that give a file another time whenever it is changed, also through a shared mapping:
# ext2 to 4, xfs, btrfs, f2fs, zfs, overlay; erofs, squashfs and iso9660, which are never written to. A tmpfs, ramfs or
# hugetlbfs takes writes to a mapping without one; network file systems and fuse show what a server says, or said once.
RELIABLE = frozenset(
    {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0x794C7630, 0xE0F5E1E2, 0x73717368, 0x9660}
)  # fmt: skip
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(\.gguf)", re.IGNORECASE)
_READ_BYTES = 1 << 20
_MAX_THREADS = 64
_LOCK_WAIT_S = 300.0


@dataclass(frozen=True)
class Fingerprint:
    """`digest` names the content of the files; `num_read_bytes` of `num_bytes` were read, the rest was in the cache.

    states: of the files, in the order that they were given.
    """

    digest: str
    num_files: int
    num_bytes: int
    num_read_bytes: int
    states: tuple["FileState", ...]

    @property
    def changed_ns(self) -> int:
        """The latest change of any of the files, as time.time_ns() counts."""
        return max(state.changed_ns for state in self.states)


@dataclass(frozen=True)
class FileState:
    """One state of one file; another state may have other content."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int  # mtime can be set back, this cannot

    @property
    def changed_ns(self) -> int:
        return max(self.mtime_ns, self.ctime_ns)


def weight_files(model: Path) -> list[Path]:
    """The files that decide what a model computes, sorted: weights, their index, remote code, quantization settings.

    `model` is a folder, searched with its subfolders except hidden ones, or a file: then also the other shards and the
    multimodal projector that GGUF keeps beside it. The config itself is not among them.
    """
    if model.is_file():
        match = _SHARD.fullmatch(model.name)
        shards = [f for f in model.parent.iterdir() if match and _is_shard_of(f, match[1])]
        projectors = [f for f in model.parent.glob("*mmproj*.gguf") if model.suffix == ".gguf"]
        return sorted({model, *shards, *projectors})
    return [file for file in all_files(model) if _decides(file)]


def all_files(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted, without hidden files and folders. For adapters, where all of it counts."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for at, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        try:
            here = os.stat(at)
        except OSError as error:
            _unreadable(error)
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(at, name) for name in files if not name.startswith(".")]
    return sorted(found)


def files_fingerprint(
    files: Sequence[Path], *, root: Path | None = None, cache: Path | None = None, fast: bool = False
) -> Fingerprint:
    """The fingerprint of `files`, named relative to `root` (the name alone, without it).

    cache: folder of known digests; `cache_folder()` by default.
    fast: hash pieces with XXH3, which does not resist files that were made to collide.
    Raises ConfigError where a file cannot be read, is none, or changes while it is read.
    """
    if not files:
        raise ConfigError("there is no file to fingerprint; give the files of a model or an adapter")
    now_ns = time.time_ns()  # before any file is looked at
    known = _Cache(cache if cache is not None else cache_folder(), FORMATS[fast], now_ns=now_ns)
    states = file_states(files)
    digests = {state: digest for state in set(states) if (digest := known.get(state))}
    num_read = 0
    if missing := [state for state in dict.fromkeys(states) if state not in digests]:
        # The ranks of an engine start together: the first reads, the others find its digests, if they are kept.
        with known.lock() if any(known.takes(state) for state in missing) else nullcontext():
            digests.update({state: digest for state in missing if (digest := known.get(state))})
            missing = [state for state in missing if state not in digests]
            num_read = sum(state.size for state in missing)
            for state, digest in zip(missing, _read(missing, fast=fast), strict=True):
                digests[state] = digest
                known.put(state, digest)
    whole = blake3(FORMATS[fast].encode())
    names = [file.relative_to(root).as_posix() if root else file.name for file in files]
    for name, state in sorted(zip(names, states, strict=True), key=lambda pair: pair[0]):
        entry = json.dumps([name, state.size, digests[state]]).encode()
        whole.update(len(entry).to_bytes(8, "little") + entry)
    return Fingerprint(whole.hexdigest(), len(files), sum(state.size for state in states), num_read, states)


def file_states(files: Sequence[Path]) -> tuple[FileState, ...]:
    """What `stat` says of each file; links are followed. Raises ConfigError where one cannot be looked at."""
    return tuple(_state(file) for file in files)


def cache_folder() -> Path | None:
    """Where digests are kept: ``$XDG_CACHE_HOME/kvlab/fingerprints``, else below ``~/.cache``; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        return root / "kvlab" / "fingerprints"
    return None


def file_system(path: str) -> int | None:
    """The magic number of the file system that `path` lies on (statfs(2)); None where the system does not tell. In the
    list of mounts a path is not found for sure: files of btrfs and overlay show other devices than their mounts.
    """
    if sys.platform != "linux":
        return None
    buffer = ctypes.create_string_buffer(
        1024
    )  # 120 bytes or less are filled; the number is the first word or half of it
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(path), buffer):
        return None
    word = ctypes.c_uint if os.uname().machine == "s390x" else ctypes.c_ulong
    return word.from_buffer(buffer).value & 0xFFFFFFFF


def _is_shard_of(file: Path, stem: str) -> bool:
    match = _SHARD.fullmatch(file.name)
    return match is not None and match[1] == stem


def _decides(file: Path) -> bool:
    name = file.name.lower()
    settings = name.endswith(".index.json") or ("quant" in name and ".json" in name)  # an index chooses among files
    return file.suffix.lower() in WEIGHT_SUFFIXES or name.endswith(".py") or settings


def _unreadable(error: OSError) -> NoReturn:
    raise ConfigError(_cannot_read(error.filename, error)) from error


def _cannot_read(path: object, error: OSError) -> str:
    return f"cannot read {path}: {error.strerror}; make the files of the model readable"


def _state(file: Path) -> FileState:
    try:
        path = os.path.realpath(file, strict=True)
        return _state_of(path, os.stat(path))
    except OSError as error:
        raise ConfigError(_cannot_read(file, error)) from error


def _state_of(path: str, found: os.stat_result) -> FileState:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is not a regular file; a model's weights must be files")
    return FileState(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(states: Sequence[FileState], *, fast: bool) -> list[str]:
    """The digest of each file, all pieces of all files spread over the cores."""
    pieces = [(state, start) for state in states for start in range(0, max(state.size, 1), PIECE_BYTES)]
    threads = min(num_cores(), len(pieces), _MAX_THREADS)
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="kvlab-fingerprint") as pool:
        digests = iter(list(pool.map(partial(_piece_digest, fast=fast), pieces)))
    result = []
    for state in states:
        whole = blake3(f"{FORMATS[fast]} {state.size}\0".encode())
        for _ in range(0, max(state.size, 1), PIECE_BYTES):
            whole.update(next(digests))
        result.append(whole.hexdigest())
    return result


def _piece_digest(piece: tuple[FileState, int], *, fast: bool) -> bytes:
    state, start = piece
    digest, left = xxh3_128() if fast else blake3(), min(PIECE_BYTES, state.size - start)
    buffer = memoryview(bytearray(min(_READ_BYTES, left)))
    try:
        descriptor = os.open(state.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while left and (got := os.preadv(descriptor, [buffer[: min(left, _READ_BYTES)]], start)):
                digest.update(buffer[:got])
                start, left = start + got, left - got
            after = _state_of(state.path, os.fstat(descriptor))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(_cannot_read(state.path, error)) from error
    if left or after != state:
        raise ConfigError(f"{state.path} changed while it was read; start again when the model is complete")
    return digest.digest()


class _Cache:
    """Digests by state of a file, one small file each. Anything odd about an entry means that it is not there."""

    def __init__(self, folder: Path | None, digest_format: str, *, now_ns: int) -> None:
        self._folder = folder if folder is not None and _make_private(folder) else None
        self._format = digest_format
        self._now_ns = now_ns
        self._reliable: dict[int, bool] = {}  # by device

    def takes(self, state: FileState) -> bool:
        """Whether the times of the file tell of each of its changes."""
        if state.device not in self._reliable:
            self._reliable[state.device] = file_system(state.path) in RELIABLE
        return self._reliable[state.device]

    def get(self, state: FileState) -> str | None:
        if self._folder is None or not self.takes(state):
            return None
        with suppress(OSError, ValueError, KeyError, TypeError):
            descriptor = os.open(self._entry(state), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as source:
                if not _is_private(os.fstat(descriptor)):
                    return None
                check, _, body = source.read(1 << 16).partition(b"\n")
            if check.decode() != blake3(body).hexdigest():
                return None
            entry = json.loads(body)
            if entry["format"] == self._format and entry["state"] == list(vars(state).values()):
                return str(entry["digest"])
        return None

    def put(self, state: FileState, digest: str) -> None:
        """Keep `digest`, unless the file changed so recently that its times would not show the next change."""
        if self._folder is None or not self.takes(state) or self._now_ns - state.changed_ns < RACY_NS:
            return
        body = json.dumps({"format": self._format, "state": list(vars(state).values()), "digest": digest}).encode()
        entry = self._entry(state)
        part = entry.with_name(f".{entry.name}.{secrets.token_hex(8)}")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as target:
                target.write(blake3(body).hexdigest().encode() + b"\n" + body)
            os.replace(part, entry)
        except OSError:  # a full disk or a read-only home: the next start reads again
            with suppress(OSError):
                part.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process reads at a time; without a cache, or where the holder is stuck, each for itself."""
        descriptor = None
        with suppress(OSError):
            if self._folder is not None:
                descriptor = os.open(
                    self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                )
        try:
            if descriptor is not None:
                _take(descriptor)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _entry(self, state: FileState) -> Path:
        assert self._folder is not None
        return self._folder / blake3(os.fsencode(f"{self._format}\0{state.path}")).hexdigest()[:32]


def _take(descriptor: int) -> None:
    if fcntl is None:
        return
    deadline = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return
        else:
            return


def _make_private(folder: Path) -> bool:
    """True where `folder` is there and only this user can write to it."""
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _is_private(os.stat(folder, follow_symlinks=False))
    return False


def _is_private(found: os.stat_result) -> bool:
    kind_is_plain = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return kind_is_plain and found.st_uid == os.geteuid() and not found.st_mode & 0o022
