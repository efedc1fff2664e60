"""Store URLs: ``scheme://place?option=value``, every option checked."""

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from kvlab.errors import ConfigError
from kvlab.units import parse_bytes


@dataclass
class StoreURL:
    """A parsed store URL. Options are taken one by one; `done` refuses those nobody took, so that a typo is an
    error and not a default."""

    raw: str
    scheme: str
    netloc: str
    path: str
    options: dict[str, str]
    _taken: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, raw: str) -> "StoreURL":
        parts = urlsplit(raw)
        if not parts.scheme or "://" not in raw:
            raise ConfigError(f"a store needs a URL like memory://?size=1GiB or file:///path?size=10GiB, got {raw!r}")
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(pairs)
        if len(options) != len(pairs):
            raise ConfigError(f"an option is given twice in {raw!r}")
        return cls(raw, parts.scheme, parts.netloc, unquote(parts.path), options)

    @property
    def shown(self) -> str:
        """The URL for messages: passwords are starred out."""
        text = re.sub(r"(://[^/@?]*:)[^/@?]+@", r"\1***@", self.raw)
        return re.sub(r"([?&]\w*password=)[^&]*", r"\1***", text)

    def take(self, option: str, default: str) -> str:
        self._taken.add(option)
        return self.options.get(option, default)

    def take_bytes(self, option: str, default: str) -> int:
        size = parse_bytes(self.take(option, default))
        if size < 1:
            raise ConfigError(f"{option} must be at least one byte in {self.shown!r}")
        return size

    def take_ms(self, option: str, default: str) -> float:
        """A number of milliseconds, in seconds."""
        text = self.take(option, default)
        try:
            ms = float(text)
        except ValueError:
            ms = -1.0
        if not 0 <= ms < float("inf"):
            raise ConfigError(f"{option} must be a number of milliseconds, got {text!r} in {self.shown!r}")
        return ms / 1000

    def take_bool(self, option: str, default: bool) -> bool:
        text = self.take(option, "true" if default else "false").lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{option} must be true or false, got {text!r} in {self.shown!r}")
        return text in ("true", "1", "yes")

    def done(self) -> None:
        unknown = sorted(set(self.options) - self._taken)
        if unknown:
            raise ConfigError(
                f"unknown option {unknown[0]!r} in {self.shown!r}; known: {', '.join(sorted(self._taken))}"
            )
