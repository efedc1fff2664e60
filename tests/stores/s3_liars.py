"""A server that speaks S3's protocol as it likes: honest by default, and per method what a test gives it."""

import contextlib
import hashlib
import socket
import threading
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from liars import hang_up

BUCKET = "kvlab-bucket"


def answer(status, body=b"", **headers):
    lines = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"HTTP/1.1 {status} Words\r\n{head}\r\n".encode("latin-1") + body


def error(status, code):
    return answer(status, f"<Error><Code>{code}</Code><Message>words</Message></Error>".encode())


def listed(names, token="", **more):
    entries = "".join(f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size></Contents>" for name, size in names)
    rest = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    rest = rest if token else "<IsTruncated>false</IsTruncated>"
    return answer(200, f"<ListBucketResult>{entries}{rest}</ListBucketResult>".encode())


class S3Liar:
    """`lies` are answers by method (LIST for a list), as bytes, or as `lie(liar, sock, request)` that gives them, or
    None to hang up. A request is (method, target, headers, body). Requests are kept in `asked`, bodies aside."""

    def __init__(self, lies=None, **data):
        self.lies = dict(lies or {})
        self.data = {f"kv/{key}.safetensors": value for key, value in (data or {"a": b"value of a"}).items()}
        self.asked, self.connections = [], 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.closed = threading.Event()
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, options="timeout_ms=300&retry_ms=1&longest_retry_ms=1&limit=1MiB"):
        return f"s3://{BUCKET}/kv?endpoint=http://127.0.0.1:{self.port}&{options}"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed.set()
        hang_up(self._listener, self._sockets)

    def _accept(self):
        while not self.closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError, ValueError, IndexError), sock, sock.makefile("rb") as stream:
            while line := stream.readline():
                method, target, _ = line.decode("latin-1").split(" ")
                headers = {}
                while (line := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
                    name, _, value = line.partition(": ")
                    headers[name] = value
                body = stream.read(int(headers.get("content-length", 0)))
                request = (method, target, headers, body)
                self.asked.append(request[:3])
                what = "LIST" if "list-type" in target else method
                lie = self.lies.get(what)
                said = lie(self, sock, request) if callable(lie) else self.honest(request) if lie is None else lie
                if said is None:
                    return
                sock.sendall(said)

    def honest(self, request):
        method, target, headers, body = request
        parts = urlsplit(target)
        name, query = unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/"), parse_qs(parts.query)
        if "list-type" in query:
            return listed([(name, len(value)) for name, value in self.data.items()])
        if method == "PUT":
            self.data[name] = body
            return answer(200)
        if method == "DELETE":
            self.data.pop(name, None)
            return answer(204, Content_Length=None)
        value = self.data.get(name)
        if value is None:
            missing = error(404, "NoSuchKey")
            return missing if method == "GET" else missing.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        tag = f'"{hashlib.md5(value).hexdigest()}"'
        if method == "HEAD":
            return answer(200, Content_Length=len(value), ETag=tag)
        if "range" in headers:
            last = int(headers["range"].rpartition("-")[2])
            return answer(206, value[: last + 1], ETag=tag)
        return answer(200, value, ETag=tag)
