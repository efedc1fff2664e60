"""An OpenAI-compatible server, as vLLM's is, over HTTP: prompts to it, and what kvlab says of them in its answers."""

import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from kvlab.errors import ConfigError, StoreError

Prompt = str | list[int] | list[dict[str, Any]]
MOST_ANSWER_BYTES = 16 << 20


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ApiServer:
    """An OpenAI-compatible server: errors are one line, and never show the key."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname or place.username or place.password:
            raise ConfigError(f"url must be like http://127.0.0.1:8000, got {place.scheme or 'no scheme'}://...")
        self._url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        answer = self.call("/v1/models")
        listed = answer.get("data")
        if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict) or "id" not in listed[0]:
            raise StoreError(f"{self._url} lists no models; give model=")
        return str(listed[0]["id"])

    def complete(self, prompt: Prompt, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for `prompt`; `body`: its other fields."""
        path, field = ("/v1/chat/completions", "messages") if is_chat(prompt) else ("/v1/completions", "prompt")
        return self.call(path, {**body, field: prompt})

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        text = self._answer(path, json.dumps(body).encode() if body is not None else None)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise StoreError(f"{self._url}{path} answered with something else than a JSON object")
        return answer

    def post(self, path: str) -> None:
        """Whatever it answers."""
        self._answer(path, b"")

    def _answer(self, path: str, data: bytes | None) -> bytes:
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return bytes(response.read(MOST_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
            raise StoreError(f"{self._url}{path} answered {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreError(f"{self._url} does not answer ({reason}); is vLLM's server running there?") from None


def is_chat(prompt: Prompt) -> bool:
    """Whether it is chat messages."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def row_of(answer: dict[str, Any]) -> dict[str, Any]:
    """kvlab's row about a request; empty where the connector's setting `report` is off."""
    params = answer.get("kv_transfer_params")
    row = params.get("kvlab") if isinstance(params, dict) else None
    return row if isinstance(row, dict) else {}


def prompt_tokens_of(answer: dict[str, Any]) -> int:
    usage = answer.get("usage")
    return int(usage.get("prompt_tokens", 0)) if isinstance(usage, dict) else 0
