"""One Redis server: how its connections begin, and which of its errors are those of the whole server."""

from kvlab.errors import StoreError
from kvlab.stores.circuit_breaker import CircuitBreaker
from kvlab.stores.redis.resp import ReplyError, RespConnection, ok
from kvlab.stores.redis.url import Login
from kvlab.stores.server import AnswerError, Server, ServerDownError, reason_of
from kvlab.stores.wire import connected

FATAL_REPLIES = {"loading", "masterdown", "noauth", "wrongpass", "clusterdown", "readonly", "misconf"}


class NodeDownError(ServerDownError):
    """A node does not answer, answers too late or not to the point, or does not let us in."""


class RedisNode(Server[RespConnection]):
    """A server at an address. Calls raise NodeDownError with its reason, at once while the server is left alone."""

    down_error = NodeDownError

    def __init__(self, address: tuple[str, int] | str, login: Login, health: CircuitBreaker) -> None:
        self.address = address
        self._login = login
        place = address if isinstance(address, str) else "{}:{}".format(*address)
        # Another server may have named this one, so the name is not trusted.
        super().__init__(f"Redis at {self.hide(place)}", lambda deadline: _connect(address, login, deadline), health)

    def is_fatal(self, error: AnswerError) -> bool:
        return error.reason in FATAL_REPLIES

    def reason(self, error: BaseException) -> str:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return "unreachable"
        return reason_of(error)

    def hide(self, text: str) -> str:
        return self._login.hide(text)


def _connect(address: tuple[str, int] | str, login: Login, deadline: float) -> RespConnection:
    """A connection that is let in, by `deadline`."""
    sock = connected(address, login.tls, deadline)
    try:
        connection = RespConnection(sock, [secret.reveal() for secret in login.hidden])
        _log_in(connection, login, deadline)
    except BaseException:
        sock.close()
        raise
    return connection


def _log_in(connection: RespConnection, login: Login, deadline: float) -> None:
    commands: list[list[str]] = []
    if login.password is not None:
        commands.append(["AUTH", *([login.user] if login.user else []), login.password.reveal()])
    if login.db:
        commands.append(["SELECT", str(login.db)])
    for command, reply in zip(commands, connection.calls(commands, deadline) if commands else [], strict=True):
        if not isinstance(reply, ReplyError):
            ok(reply)
        elif reply.reason in ("loading", "masterdown", "busy"):
            raise reply
        elif command[0] == "AUTH":  # the server's words might repeat the command's
            raise StoreError("the server refused the user or password", reason="auth")
        else:
            raise StoreError(f"the server refused database {login.db}: {reply}", reason=reply.reason)
