"""What is asked about the objects of a store's keys, each by a deadline."""

import re
import time
from collections.abc import Iterator, Sequence

from kvlab.hostmemory import aligned
from kvlab.stores.base import ValueTooLongError, check_fits, cut
from kvlab.stores.http import Answer, HttpConnection
from kvlab.stores.s3.answers import Page, S3Error, page_of
from kvlab.stores.s3.bucket import Bucket, Read
from kvlab.stores.s3.names import KEY_HEADER, key_of, metadata_of, name_of
from kvlab.stores.wire import ProtocolError

_TAG = re.compile(r'"[!#-~]{1,128}"')
PAGE = 1000  # names of a list that are asked for at once: S3's most
LISTING = 60  # times the deadline of a call: how long a list of all names may take


class Objects:
    """`limit`: longer values are not read."""

    def __init__(self, bucket: Bucket, limit: int) -> None:
        self._bucket = bucket
        self._limit = limit
        self._bucket_seen = False

    def write(self, key: str, pieces: Sequence[memoryview], deadline: float, *, only_new: bool = False) -> bool:
        """False if `only_new` is set and there is a value, which stays."""
        name = name_of(key)
        headers = metadata_of(key, name) | ({"if-none-match": "*"} if only_new else {})
        try:
            self._bucket.ask("PUT", name, _end(deadline), deadline, headers=headers, body=pieces)
        except S3Error as error:
            if error.reason == "precondition" and only_new:
                return False
            raise
        self._bucket_seen = True
        return True

    def read(self, key: str, out: Sequence[memoryview] | None, deadline: float) -> Sequence[memoryview] | None:
        """The value, in `out` or in memory of its own."""

        def fill(connection: HttpConnection, answer: Answer) -> Sequence[memoryview]:
            size = self._announced(answer)
            if out is not None:
                check_fits(key, size, out)
            into = [aligned(size)[:size]] if out is None else cut(out, size)
            connection.read_value(into, deadline)
            return into

        try:
            return self._bucket.ask("GET", name_of(key), fill, deadline)
        except S3Error as error:
            if error.reason != "no_key":
                raise
            return None

    def head(self, key: str, num_bytes: int, deadline: float) -> tuple[bytes, str] | None:
        """The first bytes of a value, and the tag of the object that they are of."""

        def fill(connection: HttpConnection, answer: Answer) -> tuple[bytes, str]:
            if answer.length is None or (answer.status == 206 and answer.length > num_bytes):
                raise ProtocolError("the server sent another part of a value than was asked for")
            head = bytearray(min(answer.length, num_bytes))
            connection.read_value([memoryview(head)], deadline)
            answer.keeps = answer.keeps and len(head) == answer.length  # a server may not know ranges
            return bytes(head), _tag(answer)

        if not num_bytes:
            return None if self.size(key, deadline) is None else (b"", "")
        try:
            return self._bucket.ask("GET", name_of(key), fill, deadline, headers={"range": f"bytes=0-{num_bytes - 1}"})
        except S3Error as error:
            if error.reason == "range":  # an empty value has no first byte
                return None if self.size(key, deadline) is None else (b"", "")
            if error.reason != "no_key":
                raise
            return None

    def size(self, key: str, deadline: float) -> int | None:
        def length(_: HttpConnection, answer: Answer) -> int:
            if answer.length is None:
                raise ProtocolError("the server did not say how long a value is")
            return answer.length

        try:
            found = self._bucket.ask("HEAD", name_of(key), length, deadline)
        except S3Error as error:
            if error.reason != "no_key":
                raise
            if not self._bucket_seen:  # an answer to HEAD does not say what is missing
                self._page(self._bucket.target.prefix, "", deadline)
            return None
        self._bucket_seen = True
        return found

    def remove(self, key: str, deadline: float, tag: str = "") -> bool:
        """Remove the object; with `tag` only if it is the tag's, as far as the server knows conditions. False if it is
        another by now."""
        try:
            headers = {"if-match": tag} if tag else {}
            self._bucket.ask("DELETE", name_of(key), _end(deadline), deadline, headers=headers)
        except S3Error as error:
            if tag and error.reason == "not_implemented":
                return self.remove(key, deadline)
            if error.reason not in ("no_key", "precondition"):
                raise
            return False
        return True

    def names(self, timeout_s: float) -> Iterator[tuple[str, int]]:
        """The names of objects right below the prefix, and their sizes, each page by a deadline of `timeout_s`."""
        end, token, prefix = time.monotonic() + LISTING * timeout_s, "", self._bucket.target.prefix
        while True:
            page = self._page(prefix, token, min(time.monotonic() + timeout_s, end))
            for name, size in page.names:
                if name.startswith(prefix):
                    yield name[len(prefix) :], size
            if not page.token:
                return
            if page.token == token:
                raise ProtocolError("the server gives the same page of a list again")
            token = page.token

    def key_told(self, name: str, deadline: float) -> str | None:
        """The key of an object whose name is a digest."""
        try:
            told = self._bucket.ask("HEAD", name, lambda _, answer: answer.headers.get(KEY_HEADER, ""), deadline)
        except S3Error as error:
            if error.reason != "no_key":
                raise
            return None
        return key_of(name, told)

    def _page(self, prefix: str, token: str, deadline: float) -> Page:
        query = {"list-type": "2", "delimiter": "/", "encoding-type": "url", "max-keys": str(PAGE), "prefix": prefix}
        if token:
            query["continuation-token"] = token
        page = self._bucket.ask("GET", "", lambda connection, answer: page_of(connection.read_text(answer, deadline)),
                                deadline, query=query)  # fmt: skip
        self._bucket_seen = True
        return page

    def _announced(self, answer: Answer) -> int:
        if answer.length is None:
            raise ProtocolError("the server sent a value without its length")
        if answer.length > self._limit:
            raise ValueTooLongError(f"the server announced {answer.length} bytes; the limit is {self._limit}")
        return answer.length


def _tag(answer: Answer) -> str:
    """It goes into a header of another request: none is better than an odd one."""
    tag = answer.headers.get("etag", "")
    return tag if _TAG.fullmatch(tag) else ""


def _end(deadline: float) -> Read[bytes]:
    """An answer without content."""
    return lambda connection, answer: connection.read_text(answer, deadline)
