"""Hooks that the engine calls, guarded: a cache must not stop an engine."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def never_raise(default: Callable[[], Any]) -> Callable[[F], F]:
    """A hook that fails is counted, logged the first time, and returns `default()`: a cache must not stop an engine."""

    def wrap(hook: F) -> F:
        @functools.wraps(hook)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                self._hook_failed(hook.__name__)
                return default()

        return guarded  # type: ignore[return-value]

    return wrap
