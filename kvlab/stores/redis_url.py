"""What the five kinds of Redis URL mean."""

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from kvlab.errors import ConfigError
from kvlab.stores.url import StoreURL

DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "redis-sentinel": 26379, "redis-cluster": 6379}


@dataclass
class RedisPlace:
    """Where the server is and how to get in.

    `options` are redis-py connection arguments that hold for every node (credentials, db, TLS); `hosts` are where to
    begin: the server, the sentinels, or some nodes of the cluster.
    """

    kind: str  # "single", "sentinel", "cluster"
    hosts: list[tuple[str, int]] = field(default_factory=list)
    socket_path: str = ""
    master: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sentinel_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_url(cls, url: StoreURL) -> "RedisPlace":
        user, _, hosts = url.netloc.rpartition("@")
        name, _, password = user.partition(":")
        options: dict[str, Any] = {}
        if name:
            options["username"] = unquote(name)
        if password:
            options["password"] = unquote(password)
        path = url.path.strip("/")
        place = cls(
            {"redis-sentinel": "sentinel", "redis-cluster": "cluster"}.get(url.scheme, "single"), options=options
        )
        db = url.take("db", "0") if url.scheme in ("unix", "redis-sentinel") else path or "0"
        if url.scheme == "unix":
            if not path:
                raise ConfigError(f"a unix socket needs its path, like unix:///run/redis.sock, got {url.shown!r}")
            place.socket_path = url.path
        else:
            place.hosts = [_host(text, url) for text in hosts.split(",")]
        if place.kind == "sentinel":
            if not path or "/" in path:
                raise ConfigError(f"name the master, like redis-sentinel://host:26379/mymaster, got {url.shown!r}")
            place.master = path
            secret = url.take("sentinel_password", "")
            place.sentinel_options = {"password": secret} if secret else {}
        if not db.isdigit() or (place.kind == "cluster" and db != "0"):
            raise ConfigError(f"a database must be a number (a cluster has only 0), got {db!r} in {url.shown!r}")
        options["db"] = int(db)
        if url.scheme == "rediss" or url.take_bool("tls", False):
            tls = _tls(url)
            options |= tls
            place.sentinel_options |= tls if place.kind == "sentinel" else {}
        return place


def _host(text: str, url: StoreURL) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if not text.endswith("]") and ":" in text else (text, "", "")
    if not host or (port and not (port.isdigit() and 0 < int(port) < 1 << 16)):
        raise ConfigError(f"a server must be given as host or host:port, got {text!r} in {url.shown!r}")
    return host.strip("[]"), int(port) if port else DEFAULT_PORTS[url.scheme]


def _tls(url: StoreURL) -> dict[str, Any]:
    options: dict[str, Any] = {"tls": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2}
    for option, argument in (("ca", "ssl_ca_certs"), ("cert", "ssl_certfile"), ("key", "ssl_keyfile")):
        if value := url.take(option, ""):
            options[argument] = value
    if not url.take_bool("verify", True):
        options |= {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    return options
