"""Who asks: credentials as the AWS tools find them. No URL, repr, log or message holds one."""

import configparser
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kvlab.errors import ConfigError
from kvlab.stores.url import Secret, StoreURL

MOST_FILE_BYTES = 1 << 20
_ID, _SECRET, _TOKEN = "aws_access_key_id", "aws_secret_access_key", "aws_session_token"


@dataclass(frozen=True)
class Credentials:
    access_key_id: Secret
    secret_access_key: Secret
    session_token: Secret | None = None


class CredentialSource:
    """Reads credentials when they are first asked for, and again after `forget`: they may have been replaced."""

    def __init__(self, file: str = "", profile: str = "") -> None:
        self._file = file
        self._profile = profile
        self._found: Credentials | None = None

    @classmethod
    def from_url(cls, url: StoreURL) -> "CredentialSource":
        source = cls(url.take("credentials_file", ""), url.take("profile", ""))
        if url.reads_files:
            source.get()
        return source

    def get(self) -> Credentials:
        """Raises ConfigError where there are none."""
        found = self._found
        if found is None:
            found = self._found = self._from_environment() or self._from_file()
        return found

    def forget(self) -> None:
        self._found = None

    def _from_environment(self) -> Credentials | None:
        """A file or profile that the URL names goes before the environment."""
        if self._file or self._profile:
            return None
        return _credentials({name: os.environ.get(name.upper(), "") for name in (_ID, _SECRET, _TOKEN)})

    def _from_file(self) -> Credentials:
        file = self._file or os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "")
        path = Path(file) if file else Path.home() / ".aws" / "credentials"
        profile = self._profile or os.environ.get("AWS_PROFILE", "") or "default"
        sections = _read(path)
        found = _credentials(dict(sections[profile])) if profile in sections else None
        if found is None:
            ways = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or ?credentials_file=/path"
            raise ConfigError(f"no S3 credentials: {str(path)!r} has none in profile {profile!r}; give {ways}")
        return found


def _credentials(values: dict[str, str]) -> Credentials | None:
    values = {name: value.strip() for name, value in values.items()}
    if not values.get(_ID) or not values.get(_SECRET):
        return None
    if any(not text.isascii() or not text.isprintable() for text in values.values()):
        raise ConfigError("S3 credentials must be printable ASCII without line breaks")
    token = values.get(_TOKEN, "")
    return Credentials(Secret(values[_ID]), Secret(values[_SECRET]), Secret(token) if token else None)


def _read(path: Path) -> configparser.ConfigParser:
    """The profiles in `path`; none where there is no such file."""
    parser = configparser.ConfigParser(interpolation=None, default_section="no section", strict=False)
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            plain = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            raw = stream.read(MOST_FILE_BYTES + 1) if plain else b""
    except FileNotFoundError:
        return parser
    except OSError as error:
        raise ConfigError(f"cannot read the S3 credentials file {str(path)!r}: {error.strerror}") from None
    failed = not plain or len(raw) > MOST_FILE_BYTES
    try:
        parser.read_string(raw.decode())
    except (configparser.Error, UnicodeDecodeError):  # whose messages quote the file
        failed = True
    if failed:
        raise ConfigError(f"the S3 credentials file {str(path)!r} must be a plain INI file, as AWS tools write it")
    return parser
