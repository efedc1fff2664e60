"""Names of a package that are imported on first use, so that importing the package costs next to nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(
    package: str, home: Mapping[str, str], *, shown: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of `package`, whose public names lie in the modules that `home` gives.

    `shown` are names that completion offers beside them. An unknown name is an AttributeError that lists the known.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(home)}")
        return getattr(import_module(home[name]), name)

    def names() -> list[str]:
        return [*home, *shown]

    return get, names
