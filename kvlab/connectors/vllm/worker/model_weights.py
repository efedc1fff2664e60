"""Whether the model still has the weights whose KV the namespace's version names."""

from kvlab.connectors.vllm.adapters import ADAPTERS
from kvlab.connectors.vllm.messages import Adapter
from kvlab.connectors.vllm_plugin import WEIGHT_LOADS


class ModelWeights:
    """Other weights make KV that no object may name, and objects hold KV that is not theirs: until the next reset gives
    a new version, nothing is loaded and nothing saved. Weights that come between a reset and the first token computed
    after it are those that its version names."""

    def __init__(self) -> None:
        self._num_loads = WEIGHT_LOADS.count
        self._version = ""  # of the weights that the engine loaded at its start
        self._is_used = True  # what other processes stored may be under it

    def begin(self, version: str, num_tokens: int) -> None:
        """A step of this version, that computes so many tokens."""
        if version != self._version:
            self._version, self._is_used = version, False
        if not self._is_used:
            self._num_loads = WEIGHT_LOADS.count
            self._is_used = num_tokens > 0

    @property
    def are_other(self) -> bool:
        return WEIGHT_LOADS.count != self._num_loads

    def are_other_than(self, adapter: Adapter | None) -> bool:
        """Whether other weights than those of the name are in the model, or lie under the adapter's id."""
        if self.are_other:
            return True
        return adapter is not None and ADAPTERS.num_loads(adapter.adapter_id) != adapter.num_loads
