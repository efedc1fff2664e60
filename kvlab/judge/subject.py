"""What is judged: a connector's class, and how vLLM is told of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kvlab.errors import ConfigError

STORAGE = "{storage}"  # in extra: the folder that the judge makes, and damages


@dataclass(frozen=True)
class Subject:
    """A connector: `name` is a class of `module`, or without one a name that vLLM knows.

    Parameters
    ----------
    extra
        vLLM's ``kv_connector_extra_config``. Where a text in it holds ``{storage}``, the judge puts a folder of its
        own there, and the traps that need one run.
    settings
        further arguments of vLLM's ``LLM``, for a connector that needs them.
    """

    name: str
    module: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, extra: str = "", settings: str = "") -> Self:
        """From ``MODULE:CLASS`` and JSON objects.

        >>> Subject.parse("package.module:MyConnector").module
        'package.module'
        """
        module, _, name = text.rpartition(":")
        if not name.isidentifier() or (module and not all(part.isidentifier() for part in module.split("."))):
            raise ConfigError(f"connector must be MODULE:CLASS, or a name that vLLM knows, got {text!r}")
        return cls(name, module, _object("extra", extra), _object("settings", settings))

    @property
    def has_storage(self) -> bool:
        """Whether `extra` names the judge's folder."""
        return STORAGE in json.dumps(self.extra)

    @property
    def shown(self) -> str:
        return f"{self.module}:{self.name}" if self.module else self.name

    def transfer(self, storage: str) -> dict[str, Any]:
        """Arguments of vLLM's ``KVTransferConfig``."""
        config: dict[str, Any] = {"kv_connector": self.name, "kv_role": "kv_both"}
        if self.module:
            config["kv_connector_module_path"] = self.module
        config["kv_load_failure_policy"] = "recompute"
        return {**config, "kv_connector_extra_config": _filled(self.extra, storage)}


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"{name} must be JSON: {error}, got {text!r}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r}")
    return found


def _filled(value: Any, storage: str) -> Any:
    """`value` with the folder in the place of ``{storage}``."""
    if isinstance(value, str):
        return value.replace(STORAGE, storage)
    if isinstance(value, Mapping):
        return {key: _filled(each, storage) for key, each in value.items()}
    return [_filled(each, storage) for each in value] if isinstance(value, list | tuple) else value
