"""What the master's page of numbers tells, which its own protocol does not: names of all objects, bytes, capacity."""

from kvlab.errors import StoreError
from kvlab.stores.http import Answer, HttpConnection
from kvlab.stores.server import reason_of
from kvlab.stores.wire import ProtocolError, connected
from kvlab.units import format_bytes

MOST_LISTED_BYTES = 1 << 28
_TOTALS = {b"master_allocated_bytes": "used_bytes", b"master_total_capacity_bytes": "max_bytes"}


def names(host: str, port: int, deadline: float) -> list[bytes]:
    return [name for name in _page(host, port, "/get_all_keys", deadline).split(b"\n") if name]


def totals(host: str, port: int, deadline: float) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in _page(host, port, "/metrics", deadline).split(b"\n"):
        name, _, number = line.partition(b" ")
        if name in _TOTALS and number.isdigit() and len(number) < 19:
            found[_TOTALS[name]] = int(number)
    if len(found) != len(_TOTALS):
        raise ProtocolError("the master does not tell its memory")
    return found


def _page(host: str, port: int, path: str, deadline: float) -> bytes:
    try:
        connection = HttpConnection(connected((host, port), None, deadline))
        try:
            answer = connection.ask("GET", path, {"host": f"{host}:{port}", "connection": "close"}, deadline)
            if answer.status != 200:
                raise StoreError(f"the master's page {path} answers {answer.status}", reason="no_numbers")
            return _body(connection, answer, deadline)
        finally:
            connection.close()
    except StoreError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
        text = f"the master's page of numbers at {host}:{port} cannot be read: {error}"
        raise StoreError(text, reason=reason_of(error)) from error


def _body(connection: HttpConnection, answer: Answer, deadline: float) -> bytes:
    if answer.length is None:
        return connection.read_text(answer, deadline)
    if answer.length > MOST_LISTED_BYTES:
        raise ProtocolError(f"the master announced more than {format_bytes(MOST_LISTED_BYTES)} of names")
    body = bytearray(answer.length)
    connection.read_value([memoryview(body)], deadline)
    return bytes(body)
