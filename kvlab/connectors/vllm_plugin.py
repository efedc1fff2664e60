"""What vLLM's plugin loader calls in each of its processes before a model is loaded.

The name of an engine's weights comes from their files, which are read after vLLM has loaded them. So the state of
each file is recorded before the load: a name is given only to files that are still the same. Light to import, since
vLLM calls it in an engine without kvlab's connector too.
"""

import functools
import logging
from typing import Any

from kvlab.fingerprint import FileState

logger = logging.getLogger("vllm.kvlab")
# The files of each model before the first load of it by one engine, by the engine's instance_id and the model's path.
FILES_BEFORE_LOAD: dict[tuple[str, str], tuple[FileState, ...]] = {}


def watch_loads() -> None:
    """Entry point of the group ``vllm.general_plugins``: record the files of each model that an engine with a KV
    connector loads. Does nothing where this version of vLLM has other loaders."""
    try:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.tensorizer_loader import TensorizerLoader
    except ImportError:
        return
    for loader in (BaseModelLoader, TensorizerLoader):  # the loaders of files that have a `load_model` of their own
        original = loader.__dict__.get("load_model")
        if original is not None and not hasattr(original, "records_files"):
            loader.load_model = _recording(original)


def _recording(original: Any) -> Any:
    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        if vllm_config.kv_transfer_config is not None:
            _record(self, vllm_config, model_config)
        return original(self, vllm_config, model_config, *args, **kwargs)

    load_model.records_files = True  # type: ignore[attr-defined]
    return load_model


def _record(loader: Any, vllm_config: Any, model_config: Any) -> None:
    from kvlab.connectors.vllm.weights import model_files

    key = (vllm_config.instance_id, model_config.model)
    if key in FILES_BEFORE_LOAD:  # a draft in the same files: the earliest state counts
        return
    try:
        try:
            states = model_files(model_config, vllm_config.load_config)
        except Exception:  # not on this machine yet
            loader.download_model(model_config)
            states = model_files(model_config, vllm_config.load_config)
        FILES_BEFORE_LOAD[key] = states
    except Exception as error:  # the load itself will say what is wrong
        logger.debug("kvlab: the files of %s are not known before the load: %s", model_config.model, error)
