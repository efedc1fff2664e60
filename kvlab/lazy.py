"""Names of a package that are imported on first use, so that importing the package costs next to nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from kvlab.errors import missing_package


def lazy(
    package: str, home: Mapping[str, str], *, shown: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of `package`, whose public names lie in the modules that `home` gives.

    `shown` are names that completion offers beside them. An unknown name is an AttributeError that lists the known;
    a name whose module needs an extra that is not installed is a MissingPackageError that names the extra.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(home)}")
        try:
            return getattr(import_module(home[name]), name)
        except ImportError as error:
            raise missing_package(error, f"{package}.{name}") from error

    def names() -> list[str]:
        return [*home, *shown]

    return get, names
