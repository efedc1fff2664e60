"""The cache's counters where vLLM looks for them: its periodic log line and Prometheus."""

from collections import Counter
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# counter -> what Prometheus says of it; counters named miss_<reason> become one metric with a label
DOCUMENTATION = {
    "hit_requests": "Requests that loaded KV from kvlab.",
    "hit_tokens": "Tokens whose KV was loaded from kvlab.",
    "loaded_bytes": "Bytes of KV loaded into pages, to the end of the copy.",
    "load_seconds": "Seconds spent loading, to the end of the copy.",
    "saved_tokens": "Tokens whose KV was saved.",
    "saves_dropped": "Objects not saved because nothing could be evicted.",
    "bad_objects": "Objects that could not be served as promised: broken, gone, or a failed copy.",
    "lookup_late": "Requests that went without the secondary tiers because these answered too late.",
    "lookup_failed": "Lookups in the secondary tiers that failed.",
    "loads_overdue": "Loads between steps that were given up after load_timeout_ms; their requests are computed.",
    "errors": "Errors of kvlab's own that cost a save.",
    "load_rollbacks": "Requests whose pages a load within a step could not fill; they are computed instead.",
}


class KVLabStats(KVConnectorStats):
    """Counter increments since the last interval, in `data`."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line: the counters, and the rate they give (GB are 10**9 bytes)."""
        shown = {name: round(value, 4) for name, value in sorted(self.data.items())}
        if self.data.get("load_seconds"):
            shown["load_gb_per_s"] = round(self.data.get("loaded_bytes", 0) / self.data["load_seconds"] / 1e9, 2)
        return shown

    def is_empty(self) -> bool:
        return not self.data


class Counters(Counter[str]):
    """Counters that give their increments."""

    def __init__(self) -> None:
        super().__init__()
        self._are_new = False
        self._told: dict[str, int] = {}

    def __setitem__(self, name: str, value: int) -> None:
        super().__setitem__(name, value)
        self._are_new = True

    def take_increments(self) -> KVLabStats | None:
        """What was added since the last call. Asked each step, of which most add nothing."""
        if not self._are_new:
            return None
        self._are_new = False
        told, self._told = self._told, dict(self)
        return KVLabStats(
            data={name: value - told.get(name, 0) for name, value in self._told.items() if value != told.get(name, 0)}
        )


class KVLabPromMetrics(KVConnectorPromMetrics):
    """``vllm:kvlab_<counter>`` per engine, and ``vllm:kvlab_misses`` by reason; a second engine in one process takes
    over the names that begin with vllm, as it does with vLLM's own metrics."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labels = {engine: list(values) for engine, values in per_engine_labelvalues.items()}
        self._metrics = {
            name: self._counter_cls(name=f"vllm:kvlab_{name}", documentation=text, labelnames=labelnames)
            for name, text in DOCUMENTATION.items()
        }
        self._misses = self._counter_cls(
            name="vllm:kvlab_misses",
            documentation="Requests that kvlab could not serve in full, by reason.",
            labelnames=[*labelnames, "reason"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self._labels[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._metrics:
                self._metrics[name].labels(*labels).inc(value)
            elif name.startswith("miss_"):
                self._misses.labels(*labels, name.removeprefix("miss_")).inc(value)
