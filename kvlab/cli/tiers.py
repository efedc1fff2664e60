"""Tiers as the command line takes them: ``64MiB+file:///kv?size=1TiB`` is a stack, fastest first."""

import re

_PLUS = re.compile(r"\+(?=[a-z][a-z0-9-]*(?:\+[a-z0-9-]+)*://|\s*\d|unbounded)")


def stack_of(text: str) -> list[str]:
    """The tiers of a stack: URLs, and bare sizes, which are host memory. A plus within a path or password stays.

    >>> stack_of("64MiB+file:///kv+x?size=1TiB")
    ['64MiB', 'file:///kv+x?size=1TiB']
    """
    return [tier.strip() for tier in _PLUS.split(text)]


def as_urls(text: str) -> list[str]:
    """`stack_of`, with bare sizes as the URLs that stores and vLLM's connector take.

    >>> as_urls("64MiB+file:///kv?size=1TiB")
    ['memory://?size=64MiB', 'file:///kv?size=1TiB']
    """
    return [tier if "://" in tier else f"memory://?size={tier}" for tier in stack_of(text)]
