"""kvlab inside vLLM: the only package that imports vllm.

`KVLabConnector` joins vLLM's hooks to `scheduler` (decides) and `worker` (copies), which exchange `messages`.
"""

from kvlab.connectors.vllm.connector import KVLabConnector

__all__ = ["KVLabConnector"]
