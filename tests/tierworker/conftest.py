"""Fixtures of all tests of cache servers."""

from tests.support.served import command, engines, server  # noqa: F401
