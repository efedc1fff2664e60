"""The config of one model: fields under any of their names, with errors that name what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvlab.errors import ConfigError
from kvlab.sizing.class_defaults import CLASS_DEFAULTS

_NESTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder_config")
_FROM_OUTER = ("torch_dtype", "dtype", "quantization_config", "kv_cache_quant_algo", "kv_cache_scheme")


@dataclass
class ModelConfig:
    """Config fields of one model plus where they come from.

    unknown: fields that the source does not give and that must not be derived or filled from class defaults.
    notes: every assumption made on the way, for `explain()`.
    seen: fields that some rule has asked for; `kvlab.sizing.structure` looks at the others.
    """

    name: str
    fields: Mapping[str, Any]
    source: str = "given by the caller"
    source_kind: str = "caller"
    unknown: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def model_type(self) -> str:
        return str(self.fields.get("model_type") or "")

    def get(self, *names: str) -> Any:
        """The first of `names` with a value, then the transformers class's own default, else None."""
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                self.seen.add(name)
                return value
        defaults = CLASS_DEFAULTS.get(self.model_type, {})
        for name in names:
            if name in self.unknown:
                return None
            if name in defaults:
                return defaults[name]
        return None

    def has_default(self, name: str) -> bool:
        return name in CLASS_DEFAULTS.get(self.model_type, {}) and name not in self.unknown

    def need(self, *names: str, why: str = "") -> Any:
        """Like `get`, but a missing field is a ConfigError that names it."""
        value = self.get(*names)
        if value is None:
            raise self.missing(*names, why=why)
        return value

    def missing(self, *names: str, why: str = "") -> ConfigError:
        """The error for fields of which none is there."""
        known = repr(names[0]) + (f" (or {', '.join(names[1:])})" if len(names) > 1 else "")
        reason = "its source does not give it" if set(names) & self.unknown else "the config does not give it"
        return ConfigError(
            f"cannot size {self.name}: field {known} is missing ({reason}){f', {why}' if why else ''}; "
            "give it in a dict or a complete config.json"
        )

    def count(self, *names: str, why: str = "", least: int = 1) -> int:
        """An integer field of `least` or more."""
        value = self.need(*names, why=why)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            found = next((name for name in names if self.fields.get(name) is not None), names[0])
            wanted = "a positive integer" if least == 1 else f"an integer of {least} or more"
            raise ConfigError(f"cannot size {self.name}: {found} must be {wanted}, got {value!r}")
        return value

    def per_layer(self, name: str, count: int) -> list[Any] | None:
        """A field that holds one value per layer, or None where it is not there."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple | str) or len(value) != count:
            found = f"{len(value)} values" if isinstance(value, list | tuple | str) else repr(value)
            raise ConfigError(f"cannot size {self.name}: {name} must name {count} layers one by one, got {found}")
        return list(value)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def flatten(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """`raw_config` with the language model's nested config (vision and audio models) brought to the top."""
    for nest in _NESTS:
        inner = raw_config.get(nest)
        if not isinstance(inner, Mapping) or not inner:
            continue
        outer = {key: raw_config[key] for key in _FROM_OUTER if raw_config.get(key) is not None}
        merged = {**outer, **flatten(inner), "nested_in": nest}
        if raw_config.get("model_type"):
            merged["outer_model_type"] = raw_config["model_type"]
            merged.setdefault("model_type", raw_config["model_type"])
        return merged
    return dict(raw_config)


# The decoder's own names first: in Whisper's config num_hidden_layers and num_attention_heads are the encoder's.
_LAYERS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
MAX_LAYERS = 10_000  # a limit before work
_HEADS = ("decoder_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads")


def num_layers(config: ModelConfig) -> int:
    """Decoder layers, counting those that keep nothing."""
    count = _num_layers(config)
    if count > MAX_LAYERS:
        raise ConfigError(
            f"cannot size {config.name}: {count} layers are more than the {MAX_LAYERS:,} that any model has"
        )
    return count


def _num_layers(config: ModelConfig) -> int:
    if config.model_type.startswith("longcat_flash") and config.get("num_layers"):
        return 2 * config.count("num_layers")  # two attention sublayers in each
    blocks = config.get("layers_block_type", "hybrid_override_pattern", "mixer_types", "block_configs")
    if blocks and config.get(*_LAYERS) is None:
        return len(blocks)
    return config.count(*_LAYERS)


def num_heads(config: ModelConfig) -> int:
    return config.count(*_HEADS)


def hidden_size(config: ModelConfig) -> int:
    return config.count("hidden_size", "n_embd", "d_model")


def context_length(config: ModelConfig) -> int | None:
    """Longest context the config declares, or None."""
    value = config.get("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
    return value if isinstance(value, int) and value > 0 else None
