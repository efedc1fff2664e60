"""Real servers for tests: each on a free port, with its files in a folder of its own, stopped in any case."""

import contextlib
import os
import signal
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvlab.machine.redis_server import RedisServer

PATIENT = "timeout_ms=60000"  # for a store whose server is sound: a busy machine is no failure


class Server(RedisServer):
    """One that also listens on a unix socket, with a client, and which can be silenced."""

    def __init__(self, folder, *settings, sentinel=False):
        more = () if sentinel else ("enable-debug-command yes", f"unixsocket {folder}/s")
        super().__init__(*settings, *more, folder=folder, sentinel=sentinel)
        self.socket_path = f"{folder}/s"

    def client(self, **options):
        return redis.Redis(port=self.port, socket_timeout=60, retry=Retry(NoBackoff(), 0), **options)

    @contextlib.contextmanager
    def paused(self):
        """It is silent inside: connections are taken by the system, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def running(*servers):
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


def wait_for(condition, what, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)
