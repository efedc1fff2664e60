"""AWS Signature Version 4 of a request. The body is not part of it (``UNSIGNED-PAYLOAD``): objects have a checksum of
their own, and to hash 14 MiB takes longer than to send it."""

import hashlib
import hmac
import time
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import quote

from kvlab.stores.s3.credentials import Credentials

UNSIGNED = "UNSIGNED-PAYLOAD"


def query_of(options: Mapping[str, str]) -> str:
    """A query string in the one order and spelling that signatures allow."""
    return "&".join(f"{quote(name, safe='')}={quote(options[name], safe='')}" for name in sorted(options))


def signed(
    method: str, path: str, query: str, headers: Mapping[str, str], credentials: Credentials, region: str
) -> dict[str, str]:
    """`headers` (names in lower case, `host` among them) and those that say who asks, and when."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    scope = f"{now[:8]}/{region}/s3/aws4_request"
    headers = {**headers, "x-amz-content-sha256": UNSIGNED, "x-amz-date": now}
    if credentials.session_token is not None:
        headers["x-amz-security-token"] = credentials.session_token.reveal()
    names = sorted(headers)
    listed = ";".join(names)
    canonical = "\n".join([method, path, query, *(f"{name}:{headers[name]}" for name in names), "", listed, UNSIGNED])
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = _signing_key(credentials, now[:8], region)
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    who = f"Credential={credentials.access_key_id.reveal()}/{scope}"
    headers["authorization"] = f"AWS4-HMAC-SHA256 {who},SignedHeaders={listed},Signature={signature}"
    return headers


@lru_cache(maxsize=64)
def _signing_key(credentials: Credentials, day: str, region: str) -> bytes:
    key = b"AWS4" + credentials.secret_access_key.reveal().encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key
