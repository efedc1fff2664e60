"""Classes by the name under which a package offers them: in a table of kvlab's own or by an entry point."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from kvlab.errors import ConfigError, KVLabError, missing_package


def found(group: str) -> dict[str, str]:
    """The entry points of `group`: name -> ``module:Class``. Reading what is installed takes 10 ms."""
    return {point.name: point.value for point in entry_points(group=group)}


def label(group: str, name: str, target: str) -> str:
    """How errors name it, so that the package which has the entry point can be found."""
    if target.startswith("kvlab."):
        return f"{name} of {group}"
    return f"{group} entry point {name} = {target}"


def class_at(group: str, name: str, target: str) -> Any:
    """The class at ``module:Class``; ConfigError, which names the entry point, whatever its import does."""
    where = label(group, name, target)
    module, _, path = target.partition("[")[0].strip().partition(":")  # behind a bracket: extras
    if not path:
        raise ConfigError(f"{where} must name a class, like package.module:Class")
    try:
        cls: Any = import_module(module)
        for attribute in path.split("."):
            cls = getattr(cls, attribute)
    except KVLabError:
        raise
    except ImportError as error:
        if isinstance(known := missing_package(error, where), ConfigError):
            raise known from error
        raise ConfigError(f"{where} needs a package that is not installed: {told(error)}") from error
    except (Exception, SystemExit) as error:  # a module of another package may do anything
        raise ConfigError(f"{where} cannot be loaded, repair or remove its package: {told(error)}") from error
    if not isinstance(cls, type):
        raise ConfigError(f"{where} must name a class, got {type(cls).__name__}")
    return cls


def options_of(kind: str, spec: str, example: str) -> dict[str, str]:
    """The options of ``name:option=value,option=value``, as text; ConfigError where one is none, with an `example`."""
    name, _, text = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        option, equals, value = item.partition("=")
        if not equals or not option.isidentifier():
            raise ConfigError(f"{kind} options must be like {name}:{example}; got {item!r} in {spec!r}")
        options[option] = value
    return options


def needed(module: str, what: str = "") -> Any:
    """`module`, imported on use; MissingPackageError, which names the extra that brings it, where it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise missing_package(error, what) from error


def told(error: BaseException) -> str:
    """An error of any kind in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
