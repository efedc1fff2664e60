"""kvlab inside vLLM: the only package that imports vllm.

`KVLabConnector` joins vLLM's hooks to `scheduler` (decides) and `worker` (copies), which exchange `messages`.
"""

from kvlab.errors import missing_package

try:
    from kvlab.connectors.vllm.connector import KVLabConnector
except ImportError as error:
    raise missing_package(error, "kvlab.connectors.vllm") from error

__all__ = ["KVLabConnector"]
