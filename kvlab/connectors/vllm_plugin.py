"""What vLLM's plugin loader calls in each of its processes before a model is loaded.

The name of an engine's weights comes from their files, which are read after vLLM has loaded them. So the state of
each file is recorded before the load: a name is given only to files that are still the same. What a trainer loads into
the model later has no name: it is counted. Light to import, since vLLM calls it in an engine without kvlab's connector
too.
"""

import functools
import logging
import sys
from collections.abc import Mapping
from typing import Any

from kvlab.fingerprint import FileState

MODULE = "kvlab.connectors.vllm"
logger = logging.getLogger("vllm.kvlab")
# The files of each model before the first load of it by one engine, by the engine's instance_id and the model's path.
FILES_BEFORE_LOAD: dict[tuple[str, str], tuple[FileState, ...]] = {}
# What puts other weights into a model that was loaded, in vLLM's own class of a worker.
_UPDATES = ("reload_weights", "start_weight_update", "start_draft_weight_update", "update_weights")


class WeightLoads:
    """How often this process has begun or ended to put other weights into a model that it had loaded."""

    count = 0


WEIGHT_LOADS = WeightLoads()  # one for a process, as vLLM's worker is


def watch_loads() -> None:
    """Entry point of the group ``vllm.general_plugins``: record the files of each model that an engine with a KV
    connector loads, and check the connector's settings before an engine starts. Does nothing where this version of
    vLLM has other loaders."""
    arguments = getattr(sys.modules.get("vllm.engine.arg_utils"), "EngineArgs", None)  # in the user's process alone
    if arguments is not None and not hasattr(arguments.create_engine_config, "checks_settings"):
        arguments.create_engine_config = _checking(arguments.create_engine_config)
    try:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.tensorizer_loader import TensorizerLoader
    except ImportError:
        return
    for loader in (BaseModelLoader, TensorizerLoader):  # the loaders of files that have a `load_model` of their own
        original = loader.__dict__.get("load_model")
        if original is not None and not hasattr(original, "records_files"):
            loader.load_model = _recording(original)


def _checking(original: Any) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_settings(self.kv_transfer_config)
        return original(self, *args, **kwargs)

    create_engine_config.checks_settings = True  # type: ignore[attr-defined]
    return create_engine_config


def _check_settings(transfer: Any) -> None:
    """Raise ConfigError for wrong settings where the engine has kvlab's connector, alone or among several: from within
    the engine's own process the line would stand in the middle of a log."""
    if isinstance(transfer, Mapping):  # one of MultiConnector's
        module, extra = transfer.get("kv_connector_module_path"), transfer.get("kv_connector_extra_config")
    else:
        module = getattr(transfer, "kv_connector_module_path", None)
        extra = getattr(transfer, "kv_connector_extra_config", None)
    if module == MODULE:
        from kvlab.connectors.config import ConnectorConfig

        ConnectorConfig.from_extra(extra or {})
    elif isinstance(extra, Mapping) and isinstance(extra.get("connectors"), list):
        for each in extra["connectors"]:
            if isinstance(each, Mapping):  # vLLM says what is wrong with others
                _check_settings(each)


def _recording(original: Any) -> Any:
    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        if vllm_config.kv_transfer_config is not None:
            _record(self, vllm_config, model_config)
        model = original(self, vllm_config, model_config, *args, **kwargs)
        if vllm_config.kv_transfer_config is not None:
            _count_updates(model)
        return model

    load_model.records_files = True  # type: ignore[attr-defined]
    return load_model


def _count_updates(model: Any) -> None:
    """Count what puts other weights into `model`: its own `load_weights`, which trainers call, and what vLLM's worker
    has for them."""
    if hasattr(model, "load_weights"):
        model.load_weights = _counted(model.load_weights)
    worker = getattr(sys.modules.get("vllm.v1.worker.gpu_worker"), "Worker", None)  # vLLM's others inherit from it
    for name in _UPDATES:
        original = getattr(worker, name, None)
        if original is not None and not hasattr(original, "is_counted"):
            setattr(worker, name, _counted(original))


def _counted(original: Any) -> Any:
    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        WEIGHT_LOADS.count += 1  # before: a step may run while weights arrive
        try:
            return original(*args, **kwargs)
        finally:
            WEIGHT_LOADS.count += 1

    counted.is_counted = True  # type: ignore[attr-defined]
    return counted


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
