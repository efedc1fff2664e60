"""What an S3 URL means."""

import os
import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from kvlab.errors import ConfigError
from kvlab.stores.s3.credentials import CredentialSource
from kvlab.stores.url import StoreURL

MOST_PREFIX_BYTES = 512  # names below it stay within S3's 1,024 bytes
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9-]{1,64}")
_HOST = re.compile(r"[\w.-]+|[0-9a-f:.]+", re.ASCII)
_EXAMPLE = "endpoint=http://host:port"


@dataclass(frozen=True)
class S3Target:
    """Where the bucket is, and who asks. `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str
    host: str
    port: int
    tls: ssl.SSLContext | None
    region: str
    credentials: CredentialSource = field(repr=False)

    @classmethod
    def from_url(cls, url: StoreURL) -> "S3Target":
        if url.user or url.holds_secret:
            raise ConfigError(
                f"{url.shown!r} must hold no credentials: they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "in the environment, from ~/.aws/credentials, or from the file that credentials_file= names"
            )
        if not _BUCKET.fullmatch(url.netloc):
            raise ConfigError(f"name the bucket, like s3://bucket/prefix?{_EXAMPLE}, got {url.shown!r}")
        if "size" in url.options:
            raise ConfigError(
                f"size is no option of {url.shown!r}: a bucket evicts nothing and its writers know no common total; "
                "bound it by the bucket's lifecycle rules (expire objects some days after they were written)"
            )
        prefix = url.path.strip("/")
        if len(quote(prefix)) > MOST_PREFIX_BYTES or any(
            part in ("", ".", "..") for part in prefix.split("/") if prefix
        ):
            raise ConfigError(
                f"the prefix of {url.shown!r} must be names with single slashes between, at most "
                f"{MOST_PREFIX_BYTES} bytes"
            )
        region = url.take("region", "") or _region_of_environment()
        if not _REGION.fullmatch(region):
            raise ConfigError(f"region must be a word like eu-central-1 in {url.shown!r}")
        host, port, tls = _endpoint(url, region)
        credentials = CredentialSource.from_url(url)
        return cls(url.netloc, f"{prefix}/" if prefix else "", host, port, tls, region, credentials)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def _region_of_environment() -> str:
    return os.environ.get("AWS_REGION", "") or os.environ.get("AWS_DEFAULT_REGION", "") or "us-east-1"


def _endpoint(url: StoreURL, region: str) -> tuple[str, int, ssl.SSLContext | None]:
    given = url.take("endpoint", f"https://s3.{region}.amazonaws.com")
    ca_file = url.take("ca_file", "")
    try:
        parts = urlsplit(given)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    plain = parts.scheme in ("http", "https") and not (parts.query or parts.fragment or parts.path.strip("/"))
    if not plain or not _HOST.fullmatch(host) or port == 0:
        raise ConfigError(f"the endpoint of {url.shown!r} must be like http://host:9000 or https://host")
    if parts.scheme == "http":
        if ca_file:
            raise ConfigError(f"ca_file is for an endpoint with https://, in {url.shown!r}")
        return host, port or 80, None
    try:
        context = ssl.create_default_context(cafile=ca_file if ca_file and url.reads_files else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot use the ca_file of {url.shown!r}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return host, port or 443, context
