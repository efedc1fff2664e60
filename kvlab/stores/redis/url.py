"""What the five kinds of Redis URL mean."""

import re
import ssl
from dataclasses import dataclass, field

from kvlab.errors import ConfigError
from kvlab.stores.tls import tls_of
from kvlab.stores.url import Secret, StoreURL

DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "redis-sentinel": 26379, "redis-cluster": 6379}
PASSWORD = "KVLAB_REDIS_PASSWORD"  # of servers whose URL gives none, like the next for sentinels
SENTINEL_PASSWORD = "KVLAB_REDIS_SENTINEL_PASSWORD"


@dataclass(frozen=True)
class Login:
    """What a connection begins with. `hidden` are the secrets that no message may show: these and those of the other
    servers of one store, for each may have heard of them."""

    user: str = ""
    password: Secret | None = None
    db: int = 0
    tls: ssl.SSLContext | None = None
    hidden: tuple[Secret, ...] = ()

    def hide(self, text: str) -> str:
        """`text`, in which a server's words may stand, with the secrets starred out."""
        for secret in self.hidden:
            text = text.replace(secret.reveal(), "***")
        return text


@dataclass(frozen=True)
class RedisTarget:
    """Where the server is and how to get in.

    `hosts` are where to begin: the server, the sentinels, or some nodes of the cluster. `login` holds for every node
    that keeps values, `sentinel_login` for sentinels.
    """

    kind: str  # "single", "sentinel", "cluster"
    hosts: list[tuple[str, int]] = field(default_factory=list)
    socket_path: str = ""
    master: str = ""
    login: Login = field(default_factory=Login)
    sentinel_login: Login = field(default_factory=Login)

    @classmethod
    def from_url(cls, url: StoreURL) -> "RedisTarget":
        kind = {"redis-sentinel": "sentinel", "redis-cluster": "cluster"}.get(url.scheme, "single")
        path = url.path.strip("/")
        password = url.take_secret("password", url.password, variable=PASSWORD)
        if url.user and password is None:
            ways = (
                f"user:password@host, password_file=, or {PASSWORD} in the environment; a password alone is :password@"
            )
            raise ConfigError(f"a user needs a password in {url.shown!r}: {ways}")
        db = url.take("db", "0") if url.scheme in ("unix", "redis-sentinel") else path or "0"
        if url.scheme == "unix" and not path:
            raise ConfigError(f"a unix socket needs its path, like unix:///run/redis.sock, got {url.shown!r}")
        hosts = [] if url.scheme == "unix" else [_host(text, url) for text in url.netloc.split(",")]
        sentinel_password = None
        if kind == "sentinel":
            if not re.fullmatch(r"[\w.-]+", path):
                raise ConfigError(f"name the master, like redis-sentinel://host:26379/mymaster, got {url.shown!r}")
            sentinel_password = url.take_secret("sentinel_password", variable=SENTINEL_PASSWORD)
        if not (db.isascii() and db.isdigit() and len(db) < 10) or (kind == "cluster" and db != "0"):
            form = "redis://host:6379/0"
            raise ConfigError(f"a database must be a number (a cluster has only 0), as in {form}; got {url.shown!r}")
        hidden = tuple(secret for secret in (password, sentinel_password) if secret is not None)
        tls = tls_of(url) if url.scheme == "rediss" or url.take_bool("tls", False) else None
        return cls(
            kind,
            hosts,
            socket_path=url.path if url.scheme == "unix" else "",
            master=path if kind == "sentinel" else "",
            login=Login(url.user, password, int(db), tls, hidden),
            sentinel_login=Login("", sentinel_password, 0, tls, hidden),
        )


def _host(text: str, url: StoreURL) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if not text.endswith("]") and ":" in text else (text, "", "")
    if not host or (port and not 0 < int(port) < 1 << 16):
        raise ConfigError(f"a server must be given as host or host:port in {url.shown!r}")
    return host.strip("[]"), int(port) if port else DEFAULT_PORTS[url.scheme]
