"""Which weights did the engine load, and which processor? A name for them by content, or the reason for having none."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vllm import envs

from kvlab.connectors.vllm_plugin import FILES_BEFORE_LOAD
from kvlab.errors import ConfigError
from kvlab.fingerprint import WEIGHT_SUFFIXES, FileState, all_files, file_states, files_fingerprint, weight_files
from kvlab.units import format_bytes

logger = logging.getLogger("vllm.kvlab")

# Formats that read the model's own files. Others take weights from a server, a daemon or a cache of their own.
FILE_FORMATS = frozenset(
    {"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt", "sharded_state", "bitsandbytes",
     "gguf", "runai_streamer", "runai_streamer_sharded", "tensorizer"}
)  # fmt: skip
# The config's content is a field of the namespace; the others decide what is asked and what is generated.
_JSON_WITHOUT_EFFECT = frozenset({"config.json", "generation_config.json", "chat_template.json"})
_OBJECT_STORAGE = ("s3://", "gs://", "az://", "http://", "https://")


def weights_name(vllm_config: Any, *, outlives: bool, named: bool, loaded_here: bool) -> str:
    """A name that two engines share only if their weights are the same, byte for byte, and, where they take images,
    videos or sound, all that makes embeddings of these.

    outlives: whether a tier outlives this process. Without one, keys never leave the process: nothing is read.
    named: whether the user's own `namespace` keeps this model apart where its weights cannot be read.
    loaded_here: whether this process loaded them: then the files must be those that it loaded.
    Raises ConfigError where weights or processor have no name, or the files are not those that were loaded, and a tier
    outlives the process.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    is_dummy = "dummy" in str(load.load_format)
    if not outlives:
        return f"dummy:{model.seed}" if is_dummy else _process_name(os.getpid())
    ways: dict[str, Callable[[], str]] = {
        "weights": lambda: f"dummy:{model.seed}" if is_dummy else _weights(vllm_config, loaded_here=loaded_here),
        "processor": lambda: _processor(model),
    }
    found = []
    for what, name in ways.items():
        try:
            found.append(name())
        except _Unnamed as reason:
            if not named:
                raise ConfigError(
                    f"the {what} of {model.model!r} cannot be fingerprinted ({reason}), so a tier that outlives this "
                    "process could mix its KV with another model's; set namespace= to a name of your own for this "
                    "model, or use memory:// alone"
                ) from None
            found.append(f"unread:{getattr(model, 'model_weights', '') or model.model}@{model.revision}")
    return "+".join(filter(None, found))


def _weights(vllm_config: Any, *, loaded_here: bool) -> str:
    places = _places(vllm_config.model_config, vllm_config.load_config)
    started = time.monotonic()
    prints = [files_fingerprint(weight_files(place), root=_root(place), fast=True) for place in places]
    if loaded_here:
        _check_loaded(vllm_config, tuple(state for found in prints for state in found.states))
    read = sum(found.num_read_bytes for found in prints)
    whole = sum(found.num_bytes for found in prints)
    logger.info(
        "kvlab: fingerprint of %s of weights, %s of them read, in %.2f s",
        format_bytes(whole), format_bytes(read), time.monotonic() - started,
    )  # fmt: skip
    return "+".join(found.digest for found in prints)


def draft_name(vllm_config: Any, *, outlives: bool) -> str:
    """A name of a draft model. Its KV decides how many drafts are accepted and changes no answer, so one whose files
    cannot be read goes by its own name."""
    speculative = vllm_config.speculative_config
    model = speculative.draft_model_config
    about = f"{model.model}@{model.revision}/{model.dtype}/{model.quantization}"
    if not outlives:
        return about
    try:
        places = _places(model, speculative.draft_load_config or vllm_config.load_config)
        prints = [files_fingerprint(weight_files(place), root=_root(place), fast=True) for place in places]
    except _Unnamed:
        return about
    return "+".join([*(found.digest for found in prints), f"{model.dtype}/{model.quantization}"])


def model_files(model: Any, load: Any) -> tuple[FileState, ...]:
    """The state of each file that decides what this model computes, in the order that `weights_name` reads them."""
    return file_states([file for place in _places(model, load) for file in weight_files(place)])


def _check_loaded(vllm_config: Any, now: tuple[FileState, ...]) -> None:
    """Raise ConfigError where the files changed since vLLM began to load them: their name would be the new weights',
    the KV the old ones'."""
    model = vllm_config.model_config
    before = FILES_BEFORE_LOAD.get((vllm_config.instance_id, model.model))
    if before == now:
        return
    hint = "start again"
    if before is None:  # vLLM did not call the plugin: what changed before this process began is old enough
        if max(state.changed_ns for state in now) < _process_start_ns():
            return
        hint = "or earlier in its process; start again, with kvlab among VLLM_PLUGINS"
    raise ConfigError(f"the files of {model.model!r} changed while the engine loaded them; {hint}")


def _process_start_ns() -> int:
    """On the clock of files' times, not later than the true start."""
    with open("/proc/self/stat", "rb") as source:
        ticks = int(source.read().rpartition(b")")[2].split()[19])  # since boot
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME) + ticks * 10**9 // os.sysconf("SC_CLK_TCK")


def _processor(model: Any) -> str:
    """A name of what makes embeddings of images, videos and sound; empty for a model of texts.

    vLLM names an image by the model's path, the image and options that were given, and its processors read what files
    they like: so every JSON file beside the model counts, but for those known to have no effect. Code and weights are
    `_weights`.
    """
    multimodal = getattr(model, "multimodal_config", None)
    if multimodal is None:
        return ""
    digests = []
    for source in dict.fromkeys((model.model, getattr(model, "tokenizer", None) or model.model)):
        path = Path(source)
        root = _root(path if path.exists() else _hub_snapshot(str(source), _revision(model, source), None))
        files = [file for file in all_files(root) if file.suffix == ".json" and file.name not in _JSON_WITHOUT_EFFECT]
        digests.append(files_fingerprint(files, root=root, fast=True).digest if files else "none")
    scales = getattr(multimodal, "mm_encoder_fp8_scale_path", None)
    if scales and Path(scales).exists():  # a name that is no path is an option, and those are fields
        digests.append(files_fingerprint([Path(scales)], fast=True).digest)
    return "processor:" + "+".join(digests)


def _revision(model: Any, source: str) -> str | None:
    revision: str | None = model.revision if source == model.model else getattr(model, "tokenizer_revision", None)
    return revision


class _Unnamed(Exception):
    """Why weights cannot be fingerprinted."""


@cache
def _process_name(pid: int) -> str:
    return f"process:{secrets.token_hex(16)}"  # by pid: a forked child has another


def _places(model: Any, load: Any) -> list[Path]:
    """The folders or files that hold the weights; the model's own come first."""
    load_format = str(getattr(load.load_format, "value", load.load_format))
    if load_format not in FILE_FORMATS:
        raise _Unnamed(f"load format {load_format!r} does not read them from files")
    extra = _as_mapping(load.model_loader_extra_config)
    if extra.get("qlora_adapter_name_or_path"):
        raise _Unnamed("qlora_adapter_name_or_path adds others")
    source = getattr(model, "model_weights", "") or model.model
    if load_format == "tensorizer":
        source = extra.get("tensorizer_dir") or os.path.dirname(extra.get("tensorizer_uri") or "") or source
    # Ultravox takes its language model and its encoder from repositories of their own.
    others = [getattr(model.hf_config, field, None) for field in ("text_model_id", "audio_model_id")]
    places = [_place(str(source), model.revision, load.download_dir)]
    return places + [_place(str(other), None, load.download_dir) for other in others if other]


def _place(source: str, revision: str | None, download_dir: str | None) -> Path:
    if source.lower().startswith(_OBJECT_STORAGE):
        raise _Unnamed("they lie in object storage")
    path = Path(source)
    if not path.exists():
        path = _hub_snapshot(source, revision, download_dir)
    if not path.is_file() and not any(file.suffix.lower() in WEIGHT_SUFFIXES for file in weight_files(path)):
        raise _Unnamed("their folder holds no weight file")
    return path


def _hub_snapshot(name: str, revision: str | None, download_dir: str | None) -> Path:
    """The snapshot in the hub's cache, found without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if envs.VLLM_USE_MODELSCOPE:
        raise _Unnamed("they come from ModelScope")
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True))
    except HFValidationError:
        raise _Unnamed("it names neither a local path nor a repository of the hub") from None
    except LocalEntryNotFoundError:
        raise _Unnamed("no local folder holds them") from None


def _root(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _as_mapping(extra: Any) -> Mapping[str, Any]:
    return extra if isinstance(extra, Mapping) else vars(extra) if hasattr(extra, "__dict__") else {}
