"""Store URLs: ``scheme://place?option=value``, every option checked, no secret shown."""

import os
import re
import stat
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from kvlab.errors import ConfigError, nearest
from kvlab.units import parse_bytes

MOST_SECRET_BYTES = 4096
MOST_MS = 1e11  # three years
SIMULATION_OPTIONS = ("gb_per_s", "latency_ms", "per_gb_month")  # of a tier that is not opened
# Options that are right in other places, and where.
_OF_TIERS = "it is for the tiers of a vLLM connector (kvlab.vllm_config)"
_OF_STORES = "it is for memory:// of open_store; a vLLM connector settles that for its own host memory, so leave it out"
ELSEWHERE = {
    "serde": f"{_OF_TIERS}; elsewhere give it as CacheEngine(..., serde='int4')",
    "auth": f"{_OF_TIERS}; elsewhere give it as CacheEngine(..., auth='/path'), or as kvlab store verify --auth FILE",
    "pinned": _OF_STORES,
    "wait_ms": _OF_STORES,
}
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\[\]:,@]*)(:\d{1,5})?")
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,40}")


class Secret:
    """A password. No repr, message or log shows it; `reveal` is for the one who sends it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"


@dataclass
class StoreURL:
    """A parsed store URL. Options are taken one by one; `done` refuses those not taken, so that a typo is an
    error and not a default.

    `netloc` is without user and password. Options that sound like passwords are not in `options` but given by
    `take_secret`.
    Messages show a URL as `shown`: without user, password and options.
    """

    scheme: str
    netloc: str
    path: str
    options: dict[str, str] = field(repr=False)
    shown: str
    user: str = field(default="", repr=False)
    password: Secret | None = None
    _secrets: dict[str, Secret] = field(default_factory=dict)
    reads_files: bool = True  # False: the URL is only checked, the files it names may be on another host
    _taken: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def parse(cls, raw: str) -> "StoreURL":
        if not isinstance(raw, str):
            raise ConfigError(f"a store needs a URL like memory://?size=1GiB, got {type(raw).__name__}")
        shown = shown_url(raw)
        parts = _split(raw)
        if parts is None:  # raised here: an error from within would carry the URL along
            raise ConfigError(
                f"a store URL cannot be read: {shown!r}; write / ? # [ ] @ % in a password as %2F and so on"
            )
        if not parts.scheme or "://" not in raw:
            raise ConfigError(f"a store needs a URL like memory://?size=1GiB or file:///path?size=10GiB, got {shown!r}")
        if parts.fragment or "@" in parts.query or ("@" in parts.path and parts.scheme not in ("file", "unix")):
            hint = "write / ? # @ in a user or password as %2F %3F %23 %40"
            raise ConfigError(f"a store URL has an @ or # in the wrong place: {shown!r}; {hint}")
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        options = dict(pairs)
        if len(options) != len(pairs):
            raise ConfigError(f"an option is given twice in {shown!r}")
        for name, value in pairs:  # neither is shown: it may be a part of a password, or one in the place of its file
            if not _OPTION.fullmatch(name):
                raise ConfigError(f"an option of {shown!r} is no word of lower-case letters, as in ?size=10GiB")
            if name.endswith("_file") and not value.startswith("/"):
                raise ConfigError(f"{name} must be the absolute path of a file that holds the password")
        login, _, netloc = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        if login and parts.scheme in ("file", "memory"):
            raise ConfigError(f"{parts.scheme}:// has no user or password: {shown!r}")
        if not all(_HOST.fullmatch(host) for host in netloc.split(",")):
            hint = "a login needs an @ behind it"
            raise ConfigError(f"a server must be given as host or host:port in {shown!r}; {hint}")
        if any("\0" in text for text in (unquote(parts.path), *options.values())):
            raise ConfigError(f"a path or an option of {shown!r} holds a NUL byte (%00), which no file's name has")
        secrets = {name: Secret(options.pop(name)) for name in list(options) if _is_secret(name)}
        return cls(
            parts.scheme,
            netloc,
            unquote(parts.path),
            options,
            shown,
            unquote(user),
            Secret(unquote(password)) if password else None,
            secrets,
        )

    @property
    def holds_secret(self) -> bool:
        """Whether a password stands in the URL itself."""
        return self.password is not None or bool(self._secrets)

    @property
    def masked(self) -> str:
        """The URL without login and with stars for the secrets among its options."""
        options = [*self.options.items(), *((name, repr(secret)) for name, secret in self._secrets.items())]
        text = "&".join(f"{name}={quote(value, safe='/:,*')}" for name, value in options)
        return f"{self.shown}?{text}" if text else self.shown

    def take(self, option: str, default: str) -> str:
        self._taken.add(option)
        value = self.options.get(option, default)
        if not value and option in self.options:  # an unset variable in a template: auth= would store unsigned objects
            raise ConfigError(f"option {option!r} of {self.shown!r} has no value; give one or leave it out")
        return value

    def take_secret(self, option: str, given: Secret | None = None, *, variable: str = "") -> Secret | None:
        """A password by one of three ways: `given` or as the option itself, in the file that ``<option>_file`` names,
        or in the environment's `variable`. The file's trailing line break is not part of it."""
        self._taken.add(option)
        given = given or self._secrets.get(option)
        file = self.take(f"{option}_file", "")
        if file:
            if given is not None:
                raise ConfigError(f"give the password in the URL or by {option}_file, not both, in {self.shown!r}")
            return _read_secret(file, f"{option}_file") if self.reads_files else Secret("")
        value = os.environ.get(variable, "") if variable else ""
        return given or (Secret(value) if value else None)

    def take_place(self, default_port: int) -> tuple[str, int]:
        """The one server that the URL names."""
        host, _, port = self.netloc.rpartition(":") if not self.netloc.endswith("]") else (self.netloc, "", "")
        host, port = (host, port) if host or ":" in self.netloc else (port, "")
        if not host or "," in host or (port and not 0 < int(port) < 1 << 16):
            raise ConfigError(f"a server must be given as host or host:port in {self.shown!r}")
        return host.strip("[]"), int(port) if port else default_port

    def refuse_login(self, why: str) -> None:
        """Raise ConfigError where the URL holds a user or a password, which the medium does not know."""
        if self.user or self.holds_secret:
            raise ConfigError(f"{self.shown!r} must hold no user and no password: {why}")

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
        if not 0 <= ms <= MOST_MS:
            raise ConfigError(f"{option} must be a number of milliseconds up to {MOST_MS:.0f} in {self.shown!r}")
        return ms / 1000

    def take_bool(self, option: str, default: bool) -> bool:
        text = self.take(option, "true" if default else "false").lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{option} must be true or false, got {text!r} in {self.shown!r}")
        return text in ("true", "1", "yes")

    def refuse_simulation_options(self) -> None:
        """Raise ConfigError for options that describe a tier to the simulator alone."""
        for option in SIMULATION_OPTIONS:
            if option in self.options and option not in self._taken:
                raise ConfigError(
                    f"{option} in {self.shown!r} describes a tier for simulation; a real tier is as fast as its medium "
                    "and costs what it costs, so leave it out"
                )

    def done(self) -> None:
        """Raise ConfigError if an option was given that was not taken."""
        self.refuse_simulation_options()
        unknown = sorted({*self.options, *self._secrets} - self._taken)
        for option in unknown:
            if option in ELSEWHERE:
                raise ConfigError(f"{option} is no option of {self.shown!r} here: {ELSEWHERE[option]}")
        if unknown:
            known = ", ".join(sorted(self._taken))
            if self._secrets:  # the rest of a password with an unescaped & looks like an option
                raise ConfigError(
                    f"an option of {self.shown!r} is unknown; known: {known}; write & in a password as %26"
                )
            near = nearest(unknown[0], sorted(self._taken))
            raise ConfigError(f"unknown option {unknown[0]!r} in {self.shown!r}; known: {known}{near}")


def shown_url(raw: str) -> str:
    """`raw`, which need not be a URL, for messages: without options, and without what is or might be a login.

    >>> shown_url("redis://user:hunter2@10.0.0.1:6379/0?ttl_ms=5"), shown_url("redis://:hunt/er2@h/0")
    ('redis://***@10.0.0.1:6379/0', 'redis://***@h/0')
    """
    scheme, mark, rest = raw.partition("://")
    if not mark or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        scheme, mark, rest = "", "", raw
    if mark and "@" in "".join(re.split(r"[?#]", rest, maxsplit=1)[1:]):
        return f"{scheme}{mark}***"  # of a login or of an option: where the host begins is not known
    _, at, rest = rest.rpartition("@")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    if not mark and (at or (":" in rest and not rest.startswith(("file:", "memory:")))):
        return "***"
    hosts, slash, path = rest.partition("/")
    if scheme.startswith("redis") and not re.fullmatch(r"[\w.-]{0,64}", path):
        path = "***"  # no database and no master: it may be options behind a wrong sign
    if mark:
        hosts = ",".join(host if _HOST.fullmatch(host) else "***" for host in hosts.split(","))
    return f"{scheme}{mark}{'***@' if at else ''}{hosts}{slash}{path}"


def hide_logins(text: str) -> str:
    """`text`, such as a command line, with the logins of the URLs in it starred out.

    >>> hide_logins("--redis-url redis://:hunter2@host:6379/0 --seed 1")
    '--redis-url redis://***@host:6379/0 --seed 1'
    """
    text = re.sub(r"(\w:/+[^\s?#]*)[?#](\S*)", _hide_options, text)
    return re.sub(r"(?i)(password=)[^&]+", r"\1***", re.sub(r"(\w:/+).*@", r"\1***@", text))


def _hide_options(url: re.Match[str]) -> str:
    """The options of a URL stay only if none of them can be a secret: half of a password may look like one."""
    for pair in url[2].rstrip(",'\"").split("&"):
        name, sign, value = pair.partition("=")
        if not (sign and _OPTION.fullmatch(name)) or _is_secret(name) or "@" in value:
            return f"{url[1]}?***"
    return url[0]


def _is_secret(option: str) -> bool:
    """Whether an option's value is not to be shown, misspelt names of passwords included."""
    return re.search(r"pa?ss?w|pass|pwd|secret|token", option) is not None and not option.endswith("_file")


def _split(raw: str) -> SplitResult | None:
    try:
        return urlsplit(raw)
    except ValueError:
        return None


def _read_secret(file: str, option: str) -> Secret:
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            raw = stream.read(MOST_SECRET_BYTES + 1) if stat.S_ISREG(os.fstat(stream.fileno()).st_mode) else b""
    except OSError as error:
        raise ConfigError(f"cannot read {option} {file!r}: {error.strerror}") from error
    text = raw.decode(errors="replace").rstrip("\r\n")
    if not text or "�" in text or len(raw) > MOST_SECRET_BYTES:
        raise ConfigError(f"{option} {file!r} must hold one password, in UTF-8, of at most {MOST_SECRET_BYTES} bytes")
    return Secret(text)
