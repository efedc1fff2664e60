"""Serdes of whole chunks, `cachegen` above all, for an engine: its model's tables, and what they must fit.

The tables lie beside the model (``kvlab profile MODEL TEXT`` makes them) or where the tier's URL says. An engine finds
them when it starts, or does not start. They are named by digest in the namespace: with others, other objects are found.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlab.connectors.config import ConnectorConfig, check_cachegen
from kvlab.connectors.vllm import compat
from kvlab.errors import ConfigError
from kvlab.stated import is_chunked


@dataclass(frozen=True)
class TierSerde:
    """`spec`: as the process of the tiers is told it; `name`: as the namespace has it."""

    spec: str
    name: str


def tier_serde(config: ConnectorConfig, vllm_config: Any, kv_cache_config: Any) -> TierSerde:
    """How this engine's secondary tiers encode. ConfigError where its model has no tables, or others than it needs."""
    if not is_chunked(config.serde):
        return TierSerde(config.serde, config.namespace_serde)
    groups = compat.served_groups(kv_cache_config)
    if groups.are_several or groups.have_windows:
        raise ConfigError(
            f"serde {config.serde!r} codes all tokens of a chunk together, and some of this model's layers keep only a "
            "window of them; use int8, int4 or lossless"
        )
    if config.serde.partition(":")[0] != "cachegen":
        return TierSerde(config.serde, config.serde)
    from kvlab.serde.cachegen import CacheGenSerde

    options = check_cachegen(config.serde)
    path = _tables_of(options.get("tables", ""), vllm_config.model_config.model)
    level = options.get("level", "1.0")
    serde = CacheGenSerde(tables=str(path), level=level)
    planes, channels = serde.tables.unit.shape
    for (layers, _, heads, kv, dim), _ in compat.typed_blocks(vllm_config, kv_cache_config):
        if (2 * layers, heads * dim, heads, kv) != (planes, channels, serde.tables.kv_heads, 2):
            raise ConfigError(
                f"the tables {str(path)!r} are for {planes // 2} layers of {serde.tables.kv_heads} heads, a rank of "
                f"this engine has {layers} of {heads}: make the model's own with kvlab profile, or use int4 where "
                "several ranks hold it"
            )
    return TierSerde(f"cachegen:tables={path},level={level}", serde.spec)


def _tables_of(given: str, model: str) -> Path:
    """The file of the tables."""
    from kvlab.serde.tables import FILE

    path = Path(given) if given else Path(model) / FILE
    if path.is_file():
        return path.resolve()
    if given:
        raise ConfigError(f"cachegen's tables={given!r} is no file; make it with: kvlab profile MODEL TEXT --out FILE")
    raise ConfigError(
        f"cachegen needs its model's tables, and there is no {FILE} in {model!r}; make it with: kvlab profile MODEL "
        "TEXT, or name it: ?serde=cachegen:tables=PATH"
    )
