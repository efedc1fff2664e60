"""Connectors: where kvlab meets an engine."""

from kvlab.connectors.config import ConnectorConfig, vllm_config

__all__ = ["ConnectorConfig", "vllm_config"]


def __dir__() -> list[str]:
    return __all__
