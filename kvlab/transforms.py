"""A function of yours between an engine's pages and its host memory: `KVTransform`, by name.

``transform="noise:level=0.01"`` among the connector's settings. A package offers its own through the entry point group
``kvlab.transforms`` (name -> class), made with the options behind the colon as keyword arguments.
"""

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvlab.errors import ConfigError, among
from kvlab.installed import class_at, found, label, options_of, told

if TYPE_CHECKING:
    import torch

GROUP = "kvlab.transforms"  # of entry points
TRANSFORMS: dict[str, str] = {}  # name -> "module:Class", of this process alone


class KVTransform:
    """What the cache keeps of a block's KV, and what it gives back.

    Both take and return the same shape and dtype: (layers, tokens, kv_heads, kv, head_dim), keys after RoPE, the tokens
    of a block that are an object's. The same input always gives the same output: two requests share what one saved.
    """

    def on_save(self, kv: "torch.Tensor") -> "torch.Tensor":
        """What is kept of `kv`."""
        return kv

    def on_load(self, kv: "torch.Tensor") -> "torch.Tensor":
        """What the engine is given for what `on_save` returned."""
        return kv


_digests: dict[type[KVTransform], str] = {}  # of the code that this process runs


def get_transform(spec: str) -> KVTransform:
    """The transform that ``name`` or ``name:option=value,option=value`` names; values are text.

    Raises
    ------
    ConfigError
        for an unknown name, with the known ones named, and for a class that is none or does not take these options
    """
    cls, name, options = _class_of(spec)
    try:
        return cls(**options)
    except Exception as error:
        raise ConfigError(f"transform {name!r} does not take these options: {told(error)}") from error


def transform_id(spec: str) -> str:
    """How the namespace names it: its spec, and a digest of the file that its class is written in, as other code makes
    other KV. What that file imports is not named."""
    cls, _, _ = _class_of(spec)
    file = getattr(sys.modules[cls.__module__], "__file__", None)
    if file is None:
        raise ConfigError(f"transform {spec!r} must be a class in a file, which names what it does")
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    if _digests.setdefault(cls, digest) != digest:
        raise ConfigError(f"the code of transform {spec!r} has changed since it was loaded: restart this process")
    return f"{spec}@{digest}"


def _class_of(spec: object) -> tuple[type[KVTransform], str, dict[str, str]]:
    if not isinstance(spec, str):
        raise ConfigError(f"transform must be a name like 'noise:level=0.01', got {type(spec).__name__}")
    name, options = spec.partition(":")[0], options_of("transform", spec, "level=0.01")
    target = TRANSFORMS.get(name) or found(GROUP).get(name)
    if target is None:
        known = among(name, sorted({*TRANSFORMS, *found(GROUP)}), none=f"none; packages offer them as {GROUP}")
        raise ConfigError(f"unknown transform {name!r}; {known}")
    cls = class_at(GROUP, name, target)
    if not issubclass(cls, KVTransform):
        raise ConfigError(f"{label(GROUP, name, target)} must be a class made from KVTransform, got {cls.__name__}")
    return cls, name, options
