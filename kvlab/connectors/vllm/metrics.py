"""The cache's counters where vLLM looks for them: its periodic log line and Prometheus."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvlab.connectors.vllm.messages import TierRow

# counter -> what Prometheus says of it; counters named miss_<reason> become one metric with a label
DOCUMENTATION = {
    "hit_requests": "Requests that loaded KV from kvlab.",
    "hit_tokens": "Tokens whose KV was loaded from kvlab.",
    "saved_tokens": "Tokens whose KV was saved.",
    "saves_dropped": "Objects not saved because nothing could be evicted.",
    "bad_objects": "Objects that could not be served as promised: broken, gone, or a failed copy.",
    "lookup_late": "Requests that went without the secondary tiers because these answered too late.",
    "lookup_failed": "Lookups in the secondary tiers that failed.",
    "loads_overdue": "Loads between steps that were given up after load_timeout_ms; their requests are computed.",
    "errors": "Errors of kvlab's own that cost a save.",
    "load_rollbacks": "Requests whose pages a load within a step could not fill; they are computed instead.",
    "pins_refused": "Objects not pinned because half of the memory tier is pinned.",
    "writes_dropped": "Objects not written to the secondary tiers because their process had too much to do.",
    "tier_worker_deaths": "Times the process of the secondary tiers was lost: it ended, or hung and was killed.",
    "tier_worker_restarts": "Times it was started again.",
    "weights_changed": "Times the model got other weights without a reset, which turns the cache off.",
    "quality_checks": "Requests that were computed in spite of a hit, and compared with it; see quality_check.",
    "saves_over_quota": "Objects not kept in memory because their cache_salt has its share of the memory tier.",
}
LOADED_BYTES = "Bytes of KV loaded into pages, by the tier they came from."
LOAD_SECONDS = "Seconds of one request's load, to the end of the copy, by the tier it came from."
LOAD_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
QUALITY_ERROR = "How far K or V in host memory is from what was computed, in units of what differs between tokens."
QUALITY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
TIER_GAUGES = {
    "tier_used_bytes": ("used_bytes", "Bytes that a tier holds."),
    "tier_max_bytes": ("max_bytes", "Bytes that a tier may hold."),
    "tier_up": ("up", "1 while a tier answers, 0 while it is left alone after a failure."),
}
TIER_COUNTERS = {
    "tier_evictions": ("evictions", "Objects that a tier evicted."),
    "tier_read_bytes": ("get_bytes", "Bytes read from a tier."),
    "tier_written_bytes": ("put_bytes", "Bytes written to a tier."),
}


class KVLabStats(KVConnectorStats):
    """What was counted since the last interval, in `data`: increments by name; under ``loads`` tier, bytes and seconds
    of each load, under ``checks`` what each comparison found, under ``tiers`` the latest row of each tier."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            if name == "tiers":
                tiers = self.data.setdefault("tiers", {})
                for tier, row in value.items():
                    tiers[tier] = asdict(TierRow(**row).after(TierRow(**tiers.get(tier, {}))))
            elif name in ("loads", "checks"):
                self.data[name] = self.data.get(name, []) + value
            else:
                self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line: the counters, and the rate they give (GB are 10**9 bytes)."""
        counts = {name: value for name, value in self.data.items() if name not in ("loads", "checks", "tiers")}
        shown = {name: round(value, 4) for name, value in sorted(counts.items())}
        if self.data.get("load_seconds"):
            rate = self.data.get("loaded_bytes", 0) / self.data["load_seconds"] / 1e9
            shown["load_gb_per_s"] = float(f"{rate:.3g}")  # a slow tier's is no 0
        return shown

    def is_empty(self) -> bool:
        return not self.data


class Counters(Counter[str]):
    """Counters that give their increments, with loads and rows of tiers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self._are_new = False
        self._told: dict[str, int] = {}
        self._loads: list[tuple[str, int, float]] = []
        self._checks: list[dict[str, float]] = []
        self._tiers: dict[str, TierRow] = {}

    def loaded(self, tier: str, num_bytes: int, seconds: float) -> None:
        """One request's load."""
        self["loaded_bytes"] += num_bytes
        self["load_seconds"] += seconds  # type: ignore[assignment]  # a Counter adds floats too
        self._loads.append((tier, num_bytes, seconds))

    def checked(self, errors: Mapping[str, float]) -> None:
        """One comparison: the error of each plane."""
        self["quality_checks"] += 1
        self._checks.append(dict(errors))

    def see_tiers(self, rows: Mapping[str, TierRow]) -> None:
        for tier, row in rows.items():
            earlier = self._tiers.get(tier)
            self._tiers[tier] = row if earlier is None else row.after(earlier)
            self._are_new = True

    def __setitem__(self, name: str, value: int) -> None:
        super().__setitem__(name, value)
        self._are_new = True

    def take_increments(self) -> KVLabStats | None:
        """What was added since the last call. Asked each step, of which most add nothing."""
        if not self._are_new:
            return None
        self._are_new = False
        told, self._told = self._told, dict(self)
        data: dict[str, Any] = {
            name: value - told.get(name, 0) for name, value in self._told.items() if value != told.get(name, 0)
        }
        if self._loads:
            data["loads"], self._loads = self._loads, []
        if self._checks:
            data["checks"], self._checks = self._checks, []
        if self._tiers:
            data["tiers"] = {tier: dict(vars(row)) for tier, row in self._tiers.items()}
            self._tiers = {}
        return KVLabStats(data=data)

    @property
    def are_new(self) -> bool:
        """Whether there is something that `take_increments` has not given."""
        return self._are_new


class KVLabPromMetrics(KVConnectorPromMetrics):
    """``vllm:kvlab_<counter>`` per engine, ``vllm:kvlab_misses`` by reason, loads and tiers by tier. A second engine in
    one process takes over the names that begin with vllm, as it does with vLLM's own metrics."""

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
        for labels in self._labels.values():  # a counter that first shows with a 1 would hide that from `increase`
            for metric in self._metrics.values():
                metric.labels(*labels)
        by_tier = [*labelnames, "tier"]
        self._loaded_bytes = self._counter_cls(
            name="vllm:kvlab_loaded_bytes", documentation=LOADED_BYTES, labelnames=by_tier
        )
        self._load_seconds = self._histogram_cls(
            name="vllm:kvlab_load_seconds", documentation=LOAD_SECONDS, labelnames=by_tier, buckets=LOAD_BUCKETS_S
        )
        self._quality_error = self._histogram_cls(
            name="vllm:kvlab_quality_error",
            documentation=QUALITY_ERROR,
            labelnames=[*labelnames, "plane"],
            buckets=QUALITY_BUCKETS,
        )
        self._tier_gauges = {
            field: self._gauge_cls(name=f"vllm:kvlab_{name}", documentation=text, labelnames=by_tier)
            for name, (field, text) in TIER_GAUGES.items()
        }
        self._tier_counters = {
            field: self._counter_cls(name=f"vllm:kvlab_{name}", documentation=text, labelnames=by_tier)
            for name, (field, text) in TIER_COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self._labels[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._metrics:
                self._metrics[name].labels(*labels).inc(value)
            elif name.startswith("miss_"):
                self._misses.labels(*labels, name.removeprefix("miss_")).inc(value)
        for tier, num_bytes, seconds in transfer_stats_data.get("loads", ()):
            self._loaded_bytes.labels(*labels, tier).inc(num_bytes)
            self._load_seconds.labels(*labels, tier).observe(seconds)
        for errors in transfer_stats_data.get("checks", ()):
            for plane, error in errors.items():
                self._quality_error.labels(*labels, plane).observe(error)
        for tier, row in transfer_stats_data.get("tiers", {}).items():
            for field, gauge in self._tier_gauges.items():
                gauge.labels(*labels, tier).set(row[field])
            for field, counter in self._tier_counters.items():
                if field == "evictions" or tier != "memory":  # its reads and writes are loads and saves
                    counter.labels(*labels, tier).inc(row[field])
