"""What answers that are no values say: errors by reason, and lists of names.

XML is parsed as it comes, without a tree: a document type, which entities need, is refused, and depth and text have
limits. Nothing of an answer is repeated in a message but error codes that S3 has.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote
from xml.parsers import expat

from kvlab.errors import StoreError
from kvlab.stores.wire import ProtocolError

MOST_DEPTH = 8
MOST_TEXT = 4096  # characters of one element
MOST_TOLD = 1000  # names of a page
_REASONS = {
    **dict.fromkeys(("AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken"), "denied"),
    **dict.fromkeys(("InvalidToken", "TokenRefreshRequired", "AccountProblem", "AllAccessDisabled"), "denied"),
    **dict.fromkeys(("SlowDown", "Throttling", "RequestLimitExceeded", "TooManyRequests"), "throttled"),
    **dict.fromkeys(("ServiceUnavailable", "Busy"), "throttled"),
    **dict.fromkeys(("NoSuchBucket", "InvalidBucketName"), "no_bucket"),
    **dict.fromkeys(("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"), "redirected"),
    **dict.fromkeys(("EntityTooLarge", "MaxMessageLengthExceeded"), "too_large"),
    **dict.fromkeys(("QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull", "InsufficientStorage"), "full"),
    **dict.fromkeys(("InternalError", "NotImplemented", "MethodNotAllowed", "InvalidRequest", "KeyTooLongError"), ""),
    **dict.fromkeys(("ConditionalRequestConflict", "OperationAborted"), "conflict"),
    "PreconditionFailed": "precondition",
    "RequestTimeTooSkewed": "clock",
    "RequestTimeout": "timeout",
    "NoSuchKey": "no_key",
    "InvalidRange": "range",
}
_BY_STATUS = {401: "denied", 403: "denied", 404: "no_key", 408: "timeout", 409: "conflict", 412: "precondition",
              413: "too_large", 416: "range", 429: "throttled", 501: "not_implemented", 503: "throttled",
              507: "full"}  # fmt: skip
_HINTS = {
    "denied": "check the credentials, and that they allow s3:GetObject, PutObject, DeleteObject and ListBucket",
    "no_bucket": "make the bucket first",
    "clock": "set this host's clock",
    "redirected": "the bucket is in another region or at another endpoint: give region= and endpoint=; redirects are "
    "not followed",
}  # fmt: skip
# Failures of one request; any other is the server's, which is then left alone for a while.
OF_REQUESTS = frozenset(
    {"conflict", "precondition", "full", "too_large", "no_key", "range", "not_implemented", "bad_request"}
)


class S3Error(StoreError):
    """The server answered with an error."""


@dataclass
class Page:
    """Some of the names in a bucket. `token` asks for the next page, and is empty on the last."""

    names: list[tuple[str, int]] = field(default_factory=list)  # and the sizes of their objects
    token: str = ""


def error_of(status: int, body: bytes) -> S3Error:
    """What an answer of this status means; `body` is empty where there was none."""
    code = ""
    with suppress(ProtocolError):  # the status says enough
        code = _Texts({("Error", "Code")}).parse(body).get(("Error", "Code"), "") if body else ""
    reason = _REASONS.get(code) or _BY_STATUS.get(status) or _by_class(status)
    hint = _HINTS.get(reason, "")
    text = f"the server answered {status}{f' {code}' if code in _REASONS else ''}{f'; {hint}' if hint else ''}"
    return S3Error(text, reason=reason)


def _by_class(status: int) -> str:
    return {3: "redirected", 4: "bad_request", 5: "server_error"}.get(status // 100, "protocol")


class _Texts:
    """The text of the elements at `wanted` paths, the last of each; `ended` is called at the end of every element."""

    def __init__(self, wanted: set[tuple[str, ...]]) -> None:
        self.found: dict[tuple[str, ...], str] = {}
        self._wanted = wanted
        self._path: tuple[str, ...] = ()
        self._parser: Any = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text

    def parse(self, body: bytes) -> dict[tuple[str, ...], str]:
        try:
            self._parser.Parse(body, True)
        except (expat.ExpatError, LookupError, ValueError):  # the latter two for an encoding that is none
            raise ProtocolError("the server answered with XML that is malformed") from None
        return self.found

    def ended(self, path: tuple[str, ...]) -> None:
        pass

    def _refuse(self, *_: object) -> None:
        raise ProtocolError("the server answered with XML that has a document type")

    def _start(self, name: str, _: Mapping[str, str]) -> None:
        self._path += (name,)
        if len(self._path) > MOST_DEPTH:
            raise ProtocolError("the server answered with XML deeper than any answer is")
        if self._path in self._wanted:
            self.found[self._path] = ""

    def _end(self, _: str) -> None:
        self.ended(self._path)
        self._path = self._path[:-1]

    def _text(self, text: str) -> None:
        if self._path in self._wanted:
            self.found[self._path] += text
            if len(self.found[self._path]) > MOST_TEXT:
                raise ProtocolError("the server answered with XML whose text is longer than any name")


class _List(_Texts):
    """The body of ListObjectsV2."""

    _ROOT = ("ListBucketResult",)
    _ENTRY = (*_ROOT, "Contents")
    _KEY, _SIZE = (*_ENTRY, "Key"), (*_ENTRY, "Size")
    _MORE, _TOKEN, _CODING = (*_ROOT, "IsTruncated"), (*_ROOT, "NextContinuationToken"), (*_ROOT, "EncodingType")

    def __init__(self) -> None:
        super().__init__({self._KEY, self._SIZE, self._MORE, self._TOKEN, self._CODING})
        self._entries: list[tuple[str, int]] = []

    def ended(self, path: tuple[str, ...]) -> None:
        if path != self._ENTRY:
            return
        key, size = self.found.pop(self._KEY, None), self.found.pop(self._SIZE, "")
        if key is None or not (size.isascii() and size.isdigit() and len(size) < 19):
            raise ProtocolError("the server listed an object without a name or a size")
        self._entries.append((key, int(size)))
        if len(self._entries) > MOST_TOLD:
            raise ProtocolError(f"the server listed more than {MOST_TOLD} names on a page")

    def page(self, body: bytes) -> Page:
        found = self.parse(body)
        more, token = found.get(self._MORE), found.get(self._TOKEN, "")
        if more not in ("true", "false") or (more == "true" and not token):
            raise ProtocolError("the server answered with a list that does not say whether there is more")
        if found.get(self._CODING) == "url":
            self._entries = [(unquote(name), size) for name, size in self._entries]
        return Page(self._entries, token if more == "true" else "")


def page_of(body: bytes) -> Page:
    """The answer to ListObjectsV2."""
    return _List().page(body)
