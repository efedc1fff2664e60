"""`warm` against a server that answers as vLLM's does, and wrongly; against vLLM's own in test_shutdown."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvlab.errors import ConfigError, StoreError
from kvlab.serving.warm import Warmed, read_prompts, warm

ROW = {"kvlab": {"hit_tokens": 2}}


@pytest.fixture
def server():
    """A server whose answers a test sets; it notes what was asked."""

    class Handler(BaseHTTPRequestHandler):
        answers = {  # noqa: RUF012
            "/v1/models": (200, {"data": [{"id": "m"}]}),
            "/v1/completions": (
                200,
                {"usage": {"prompt_tokens": 5}, "kv_transfer_params": {"kvlab": {"hit_tokens": 2}}},
            ),
            "/v1/chat/completions": (200, {"usage": {"prompt_tokens": 7}}),
        }
        asked = []  # noqa: RUF012

        def answer(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            self.asked.append((self.path, self.headers.get("Authorization"), body))
            status, said = self.answers[self.path]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", Handler
        listening.shutdown()


def test_prompts_of_every_kind_are_sent_with_their_hints(server):
    url, handler = server
    rows = warm(["text", [1, 2], [{"role": "user", "content": "x"}]], url=url, pin=True, ttl_s=5, cache_salt="s")
    assert rows == [Warmed(5, 2, None), Warmed(5, 2, None), Warmed(7, None, None)]
    sent = {path: body for path, _, body in handler.asked}
    assert sent["/v1/chat/completions"]["messages"] == [{"role": "user", "content": "x"}]
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = sent[path]
        assert (body["model"], body["max_tokens"], body["cache_salt"]) == ("m", 1, "s")
        assert body["kv_transfer_params"] == {"kvlab": {"pin": True, "ttl_s": 5}}


@pytest.mark.parametrize("tail", ["/", "/v1", "/v1/"])
def test_the_address_of_the_api_is_that_of_the_server(server, tail):
    url, handler = server
    warm(["text"], url=url + tail)
    assert {path for path, _, _ in handler.asked} == {"/v1/models", "/v1/completions"}


def test_wrong_answers_are_one_line_without_the_key(server):
    url, handler = server
    for answer, told in [
        ((401, b"no\nentry"), "answered 401: no entry"),
        ((200, b"[]"), "something else than a JSON object"),
        ((200, b"\xff"), "something else than a JSON object"),
    ]:
        handler.answers = {**handler.answers, "/v1/completions": answer}
        with pytest.raises(StoreError, match=told) as caught:
            warm(["text"], url=url, api_key="SECRET")
        assert "SECRET" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert handler.asked[-1][1] == "Bearer SECRET"
    handler.answers = {**handler.answers, "/v1/completions": (302, b"")}
    with pytest.raises(StoreError, match="answered 302"):
        warm(["text"], url=url, api_key="SECRET")  # the key goes to no other server
    handler.answers = {**handler.answers, "/v1/models": (200, {"data": []})}
    with pytest.raises(StoreError, match="lists no models"):
        warm(["text"], url=url)
    with pytest.raises(StoreError, match="does not answer"):
        warm(["text"], url="http://127.0.0.1:1")
    for wrong in ("file:///etc/passwd", "127.0.0.1:8000", "http://user:SECRET@host"):
        with pytest.raises(ConfigError, match="url must be like") as refused:
            warm(["text"], url=wrong)
        assert "SECRET" not in str(refused.value)
    with pytest.raises(ConfigError, match="no prompts"):
        warm([], url=url)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="ttl_s must be a number of seconds above 0"):
            warm(["text"], url=url, pin=True, ttl_s=wrong)
    with pytest.raises(ConfigError, match="ttl_s is how long a pin lasts: give pin=True as well"):
        warm(["text"], url=url, ttl_s=5)


def test_files_of_prompts(tmp_path):
    listed = tmp_path / "p.jsonl"
    chat = [{"role": "system", "content": "s"}]
    lines = ["text", [1, 2], chat, {"prompt": "text"}, {"messages": chat}]
    listed.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_prompts(listed) == ["text", [1, 2], chat, "text", chat]
    whole = tmp_path / "p.txt"
    whole.write_text("all of it\n")
    assert read_prompts(whole) == ["all of it\n"]
    for line, told in [("{", "is not JSON"), ("[]", "must be"), ('{"x": 1}', "must be"), ("[true]", "must be")]:
        listed.write_text('"fine"\n' + line)
        with pytest.raises(ConfigError, match=f"line 2 of .* {told}"):
            read_prompts(listed)
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "absent.txt")
    listed.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_prompts(listed)
