"""Serde: KV tensor to bytes, by name.

``get_serde("naive")``, ``get_serde("int4:group=64")``. A package adds its own through the entry point group
``kvlab.serde`` (name -> class); a class is made with the options after the colon as keyword arguments.
"""

from functools import cache

from kvlab.errors import ConfigError, FormatError, KVLabError, among, missing_package
from kvlab.installed import class_at, found, label, options_of, told

try:
    from kvlab.serde.base import Encoded, Serde
except ImportError as error:
    raise missing_package(error, "kvlab.serde") from error

__all__ = ["SERDES", "Encoded", "Serde", "get_serde", "serde_to_read"]

GROUP = "kvlab.serde"  # of entry points
SERDES = {  # name -> "module:Class"; imported on use
    "naive": "kvlab.serde.naive:NaiveSerde",
    "lossless": "kvlab.serde.lossless:LosslessSerde",
    "fp8": "kvlab.serde.quantized:Fp8Serde",
    "int8": "kvlab.serde.quantized:Int8Serde",
    "int4": "kvlab.serde.quantized:Int4Serde",
    "centered": "kvlab.serde.centered:CenteredSerde",
    "rotated4": "kvlab.serde.rotated:Rotated4Serde",
    "cachegen": "kvlab.serde.cachegen:CacheGenSerde",
    "cachegen-lmcache": "kvlab.serde.cachegen_lmcache:CacheGenLMCacheSerde",
}


def get_serde(spec: str) -> Serde:
    """The serde that `spec` names.

    Parameters
    ----------
    spec
        ``name`` or ``name:option=value,option=value``. Names: ``naive``, ``lossless``, ``fp8``, ``int8``, ``int4``,
        ``centered``, ``rotated4``, ``cachegen``, ``cachegen-lmcache``, and those of the entry point group
        ``kvlab.serde``.

    Returns
    -------
    Serde
        ``encode(kv, axes)`` takes a tensor with one axis name for each dimension, such as (layers, tokens, kv_heads,
        kv, head_dim), and gives `Encoded`; ``decode`` gives the tensor back.

    Raises
    ------
    ConfigError
        for an unknown name or option, with the known ones named

    References
    ----------
    Each kind's module names its source; ``cachegen`` is arXiv 2310.07240.

    Examples
    --------
    >>> get_serde("int4:group=32")
    get_serde('int4:k=channel,v=token,group=32')
    """
    given: object = spec  # from users, whatever the annotation says
    if not isinstance(given, str):
        raise ConfigError(
            f"serde must be a name like 'naive' or 'int4:group=64', got {type(given).__name__}; a class of your own "
            "has one by SERDES['mine'] = 'module:Class' or the entry point group kvlab.serde"
        )
    name, _, options = spec.partition(":")
    target = SERDES.get(name) or _found().get(name)
    if target is None:
        raise ConfigError(f"unknown serde {name!r}; {among(name, sorted({*SERDES, *_found()}))}")
    arguments = options_of("serde", spec, "group=64,k=channel")
    cls = class_at(GROUP, name, target)
    try:
        serde = cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"serde {name!r} does not take these options: {options!r} ({error})") from error
    except KVLabError:
        raise
    except Exception as error:
        if name in SERDES:
            raise
        raise ConfigError(f"{label(GROUP, name, target)} cannot be made: {told(error)}") from error
    if not isinstance(serde, Serde):
        raise ConfigError(f"{label(GROUP, name, target)} must be a kvlab Serde, got {type(serde).__name__}")
    return serde


def serde_to_read(name: str) -> Serde:
    """The serde for objects that say they were written by `name`; FormatError where there is none.

    It is made without options: `name` comes from a medium that others can write, and must choose nothing but one of
    the installed kinds.
    """
    if name not in SERDES and name not in _found():
        raise FormatError(f"no serde is called {name!r}", reason="serde")
    try:
        return get_serde(name)
    except ConfigError as error:
        raise FormatError(f"objects of {name} are not read here: {error}", reason="serde") from error


@cache
def _found() -> dict[str, str]:
    """Kinds that other packages add."""
    return found(GROUP)


def __dir__() -> list[str]:
    return __all__
