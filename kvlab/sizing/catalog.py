"""Where a config comes from: a name in models.json, a dict, a file or its folder, a transformers config, the hub."""

import difflib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from kvlab.errors import ConfigError, UnknownModelError
from kvlab.sizing.model_config import ModelConfig, flatten

_ABOUT = ("source", "source_kind", "also_seen", "unknown")
_SUFFIX = re.compile(
    r"[-_](instruct|chat|base|it|pt|hf|bf16|fp16|fp8(-dynamic|-kv|-block)?|nvfp4|mxfp4|awq(-int4)?|"
    r"gptq(-int[48])?|int[48]|[48]bit|w[48]a(8|16)|bnb-4bit|gguf|mlx|quantized)$",
    re.IGNORECASE,
)


@cache
def catalog() -> dict[str, dict[str, Any]]:
    """Every model known offline, by its hub id. See docs/guide/sizing.md for the schema."""
    text = files("kvlab.sizing").joinpath("models.json").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = json.loads(text)["models"]
    return models


def load_config(model: Any, *, hub: bool = False) -> ModelConfig:
    """The config of `model`: a name, a mapping, a path to a config.json or its folder, or a transformers config object.

    hub: whether a name that is not in the catalog may be fetched from the Hugging Face hub (its config.json only).
    Raises UnknownModelError naming the nearest names, or ConfigError for a file that is no model config.
    """
    if isinstance(model, Mapping):
        return _from_config(str(model.get("_name_or_path") or model.get("model_type") or "this config"), model)
    if isinstance(model, PathLike) or (isinstance(model, str) and _is_path(model)):
        return _from_path(Path(model))
    if isinstance(model, str):
        return _from_name(model, hub=hub)
    if callable(getattr(model, "to_dict", None)):
        raw_config = model.to_dict()
        config = _from_config(
            str(raw_config.get("_name_or_path") or raw_config.get("model_type") or "this config"), raw_config
        )
        config.source, config.source_kind = f"{type(model).__name__} object", "transformers_config"
        return config
    raise ConfigError(
        f"model must be a name, a dict, a path or a transformers config, got {type(model).__name__}; "
        "try 'Qwen2.5-7B' or a path to config.json"
    )


def _is_path(text: str) -> bool:
    # a folder that merely has a model's name must not hide the model
    return text.endswith(".json") or text.startswith((".", "/", "~")) or (Path(text) / "config.json").is_file()


def _from_config(name: str, raw_config: Mapping[str, Any], **about: Any) -> ModelConfig:
    if not raw_config:
        raise ConfigError("the model config is empty; give at least num_hidden_layers, heads and head_dim")
    own = {key: raw_config[key] for key in _ABOUT if key in raw_config}
    fields = {key: value for key, value in raw_config.items() if key not in _ABOUT}
    about = {**about, **{key: own[key] for key in ("source", "source_kind") if key in own}}
    unknown = own.get("unknown") or ()
    if not isinstance(unknown, list | tuple) or not all(isinstance(field, str) for field in unknown):
        raise ConfigError(f"cannot size {name}: 'unknown' must be a list of field names, got {unknown!r}"[:300])
    return ModelConfig(name, flatten(fields), unknown=frozenset(unknown), **about)


def _from_path(path: Path) -> ModelConfig:
    path = path.expanduser()
    file = path / "config.json" if path.is_dir() else path
    try:
        raw_config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {file}: {e.strerror}; give a config.json or the folder that holds it") from e
    except ValueError as e:
        raise ConfigError(f"{file} is not JSON ({e}); give a model's config.json") from e
    if not isinstance(raw_config, dict):
        raise ConfigError(
            f"{file} holds a JSON {type(raw_config).__name__}, not a model config; give a model's config.json"
        )
    quant = file.parent / "hf_quant_config.json"  # NVIDIA ModelOpt keeps the KV dtype beside the config
    if quant.is_file():
        algo = json.loads(quant.read_text(encoding="utf-8")).get("quantization", {}).get("kv_cache_quant_algo")
        raw_config = {**raw_config, "kv_cache_quant_algo": algo}
    name = file.parent.resolve().name if file.name == "config.json" else file.stem
    return _from_config(name, raw_config, source=str(file), source_kind="config_json")


def _from_name(name: str, *, hub: bool) -> ModelConfig:
    entry, note = find_entry(name)
    if entry is None:
        if hub:
            return _from_hub(name)
        near = nearest_names(name)
        raise UnknownModelError(
            f"no model is called {name!r}; nearest: {', '.join(near) or 'none'}; or give a config.json, or hub=True"
        )
    config = _from_config(entry, catalog()[entry])
    if note:
        config.note(note)
    return config


def find_entry(name: str) -> tuple[str | None, str]:
    """The catalog id that `name` means, and a note where it is not the id or its last part letter for letter.

    Case-blind and with the organisation optional; -Instruct, -FP8 and the like are dropped only after an exact miss.
    """
    wanted = name.strip().lower()
    for stripped in (False, True):
        if stripped:
            wanted = _strip(wanted)
        hits = [key for key in catalog() if _matches(key.lower(), wanted, stripped=stripped)]
        if hits:
            best = min(hits, key=lambda key: (_RANK.get(catalog()[key]["source_kind"], 9), len(key), key))
            return best, (f"{name!r} is not in the catalog: used the entry {best}" if stripped else "")
    return None, ""


_RANK = {"config_json_copy": 0, "vendor_config": 1, "class_default_verified": 2, "test_fixture": 3, "port": 4}


def _matches(key: str, wanted: str, *, stripped: bool) -> bool:
    own = _strip(key) if stripped else key
    return own == wanted or ("/" not in wanted and own.rpartition("/")[2] == wanted)


def _strip(name: str) -> str:
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    org, slash, last = name.rpartition("/")
    return org + slash + last.removeprefix("meta-")  # Meta-Llama-3.1 and Llama-3.1 are one model


def nearest_names(name: str, count: int = 3) -> list[str]:
    """Catalog ids whose last part looks most like `name`'s."""
    last = name.strip().lower().rpartition("/")[2]
    by_last: dict[str, str] = {}
    for key in catalog():
        by_last.setdefault(key.lower().rpartition("/")[2], key)
    return [by_last[hit] for hit in difflib.get_close_matches(last, by_last, n=count, cutoff=0.5)]


def _from_hub(name: str) -> ModelConfig:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as e:
        raise ConfigError("hub=True needs the package huggingface_hub: pip install huggingface_hub") from e
    try:
        path = hf_hub_download(name, "config.json")
    except Exception as e:
        raise UnknownModelError(
            f"the hub gave no config.json for {name!r}: {type(e).__name__}; check name, token and network"
        ) from e
    config = _from_path(Path(path))
    config.name, config.source, config.source_kind = name, f"hub:{name}", "hub"
    return config
