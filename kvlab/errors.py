"""Every error kvlab raises on purpose. Each is also the builtin a caller would expect to catch."""


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
