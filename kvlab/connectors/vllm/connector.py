"""KVLabConnector: kvlab as a vLLM V1 KV connector.

Use::

    KVTransferConfig(**kvlab.vllm_config(["memory://?size=1GiB", "file:///path?size=10GiB"]))

The class only joins vLLM's hooks to `Scheduler` (decides) and `Worker` (copies). An error in a hook costs a miss and is
counted. It reaches the engine only where a step would read pages known to be empty (`StepRollback`). Setups that cannot
be served are refused at start.
"""

import logging
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown, get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from kvlab.connectors.config import ConnectorConfig
from kvlab.connectors.vllm import compat, states
from kvlab.connectors.vllm.adapters import ADAPTERS
from kvlab.connectors.vllm.by_hand.written import ByHand
from kvlab.connectors.vllm.chunk_serde import tier_serde
from kvlab.connectors.vllm.hooks import never_raise
from kvlab.connectors.vllm.messages import RequestLoad, StepMetadata, WorkerReport
from kvlab.connectors.vllm.metrics import KVLabPromMetrics, KVLabStats
from kvlab.connectors.vllm.namespace import engine_namespace, rank_namespace
from kvlab.connectors.vllm.pages import (
    codec_of,
    map_below,
    open_engine_transfer,
    proven_map,
    slot_bytes_of,
    warn_of_rope,
    what_is_used,
)
from kvlab.connectors.vllm.scheduler.scheduler import Scheduler
from kvlab.connectors.vllm.scheduler.slots import SlotIndex
from kvlab.connectors.vllm.worker.checks import QualityChecks
from kvlab.connectors.vllm.worker.worker import Worker
from kvlab.errors import ConfigError
from kvlab.hashing import Namespace, cache_namespace
from kvlab.paged import Opaque, PageMap, page_layout
from kvlab.sharedmemory import SharedSlots
from kvlab.tierworker.client import TierClient
from kvlab.tierworker.messages import Memory, Opening
from kvlab.units import format_bytes

__all__ = ["KVLabConnector"]

logger = logging.getLogger("vllm.kvlab")


class KVLabConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's V1 connector interface over kvlab's tiers; settings as in `kvlab.connectors.ConnectorConfig`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.hook_errors: dict[str, int] = {}
        self.config = ConnectorConfig.from_extra(self._kv_transfer_config.kv_connector_extra_config)
        # A tier that fails must cost a recompute; vLLM's default fails the request. Read by the scheduler after this.
        self._kv_transfer_config.kv_load_failure_policy = "recompute"
        if role == KVConnectorRole.WORKER:
            compat.check_company(self._kv_transfer_config)
            ADAPTERS.clear()
            if vllm_config.lora_config is not None and not compat.watch_adapters():
                logger.warning(
                    "kvlab: this version of vLLM does not show which LoRA weights it loads; requests with "
                    "an adapter go without the cache"
                )
        states.refuse_unserved(vllm_config, kv_cache_config.kv_cache_groups, lossy=self.config.is_lossy)
        outlives = bool(self.config.secondary_tiers)
        compat.refuse_unserved(vllm_config, outlives=outlives)
        self.groups = compat.served_groups(kv_cache_config, ahead=compat.draft_ahead(vllm_config))
        self.chunker = self.groups.chunker(self.config.chunk_tokens)
        self._writes_early = self.groups.are_several or compat.zeroes_pages(kv_cache_config)
        pages = [compat.page_bytes(group) for group in kv_cache_config.kv_cache_groups]
        self._pages = {layer: size for group in pages for layer, size in group.items()}
        slot_bytes = slot_bytes_of(vllm_config, kv_cache_config, self.config.slot_serde)
        self.num_slots = self.config.arena_bytes // slot_bytes
        if self.num_slots < 1:
            raise ConfigError(
                f"host memory of {format_bytes(self.config.arena_bytes)} must hold a block of "
                f"{format_bytes(slot_bytes)}; give a larger size"
            )
        self._tier_serde = tier_serde(self.config, vllm_config, kv_cache_config)
        named = engine_namespace(
            vllm_config,
            kv_cache_config,
            extra=self.config.namespace,
            serde=self._tier_serde.name,
            outlives=outlives,
            loaded_here=role == KVConnectorRole.WORKER,
        )
        auth = self.config.auth
        self.namespace = cache_namespace(
            named,
            chunk_tokens=self.chunker.chunk_tokens,
            block_tokens=self.chunker.block_tokens,
            auth=auth.id if auth else None,
        )
        self.by_hand: ByHand | None = None  # where a cache is attached: see kvlab.attach
        self.kv_caches: dict[str, Any] = {}  # the engine's, by layer
        self._match = (0, False)  # tokens that the engine had computed, and whether the load is async
        self.scheduler: Scheduler | None = None
        self.worker: Worker | None = None
        self.tiers: TierClient | None = None
        self._owns_tiers = False
        ranks = vllm_config.parallel_config.tensor_parallel_size * vllm_config.parallel_config.pipeline_parallel_size
        if outlives:
            # Here, as vLLM keeps a connector whose later hook raises, and gives it to the next engine in this process.
            of_rank = [vllm_config.parallel_config.rank] if role == KVConnectorRole.WORKER else range(ranks)
            self._open_tiers([rank_namespace(self.namespace, rank) for rank in of_rank])
        if role == KVConnectorRole.SCHEDULER:
            index = SlotIndex(
                self.num_slots,
                policy=self.config.policy,
                max_owner_slots=int(self.num_slots * self.config.max_salt_share),
            )
            # Beside other connectors, which may have read the plan before a rollback, loads run between steps.
            alone = has_kv_transfer_group() and isinstance(get_kv_transfer_group(), KVLabConnector)
            self.scheduler = Scheduler(
                self.config,
                self.chunker,
                self.groups,
                index,
                self.tiers,
                ranks,
                self._load_now,
                at_once=ranks == 1 and alone and not self._writes_early and not self.groups.fail_whole,
                unfilled_groups=compat.unfilled_groups(vllm_config, kv_cache_config),
                whole_blocks=bool(self.groups.recurrent) or compat.drafts_have_kv(vllm_config),
                role=self._kv_transfer_config.kv_role,
                in_company=has_kv_transfer_group() and not alone,
                slot_bytes=slot_bytes * ranks,
            )

    def _open_tiers(self, namespaces: Sequence[Namespace]) -> None:
        """Start the process of the secondary tiers, or use the one of the worker side, where this lives in the same
        process."""
        path = self.config.server_socket
        opening = Opening(
            [] if path else list(self.config.secondary_tiers),
            self._tier_serde.spec,
            self.config.auth_file or None,
            [{"model": namespace.model, "fields": dict(namespace.fields)} for namespace in namespaces],
            self.config.slot_serde,
        )
        group = get_kv_transfer_group() if has_kv_transfer_group() else None
        beside = group.tiers if isinstance(group, KVLabConnector) else None
        if beside is not None and beside.opening == opening:
            self.tiers = beside
        else:
            self.tiers, self._owns_tiers = TierClient(opening, path=path), True

    def _hook_failed(self, name: str) -> None:
        """Call it from an exception handler: counts the error, and logs it with its traceback the first time."""
        self.hook_errors[name] = self.hook_errors.get(name, 0) + 1
        if self.hook_errors[name] == 1:
            logger.exception("kvlab: %s failed; the request goes on without the cache", name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """False: nothing happens within a forward pass. vLLM asks in the front process, so a wrong setting is raised
        there and not only in an engine process that dies."""
        ConnectorConfig.from_extra(extra_config)
        return False

    # ---- worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        try:
            self._register(kv_caches)
        except BaseException:
            ensure_kv_transfer_shutdown()  # else vLLM gives this connector to the process's next engine
            raise

    def _register(self, kv_caches: dict[str, Any]) -> None:
        self.kv_caches = dict(kv_caches)
        name = compat.layout_name(self._vllm_config, self._kv_cache_config)
        engine_groups = self._kv_cache_config.kv_cache_groups
        layout = page_layout(
            kv_caches,
            num_blocks=self._kv_cache_config.num_blocks,
            page_bytes=self._pages,
            name=name,
            content_bytes=states.content_bytes(engine_groups),
        )
        page_map: PageMap | Opaque = Opaque("no serde asks for more")
        if self.config.is_lossy or self.config.quality_check:
            page_map = proven_map(self._vllm_config, self._kv_cache_config, kv_caches, self._pages)
        warn_of_rope(self.config.serde, self._vllm_config, page_map)
        codec = codec_of(self.config.slot_serde, page_map, layout, self.config.transform)
        slot_bytes = layout.block_bytes if codec is None else codec.slot_bytes
        if slot_bytes * self.num_slots > self.config.arena_bytes:
            raise ConfigError(
                f"a block holds {layout.block_bytes} bytes in the engine's memory, more than its specs say; "
                "run this model without the connector"
            )
        shared = None
        if self.tiers is not None:
            shared = SharedSlots(self.num_slots, slot_bytes)
            shape = (layout.num_layers, layout.page_bytes) if codec is None else (1, slot_bytes)
            is_coded_below = codec is None and self.config.is_lossy
            below = map_below(self._tier_serde.spec, page_map, layout) if is_coded_below else None
            self.tiers.share(Memory(self.num_slots, *shape, below), shared)
        transfer = open_engine_transfer(
            layout, codec, self.num_slots, staging_bytes=self.config.gpu_staging, shared=shared
        )
        self.worker = Worker(
            transfer,
            self.num_slots,
            self.tiers,
            shared,
            writes_early=self._writes_early,
            load_timeout_s=self.config.load_timeout_ms / 1e3,
            borrows=not self.config.keeps_memory,
            padding=states.Padding(layout, kv_caches, engine_groups) if self.groups.recurrent else None,
            checks=QualityChecks(transfer, page_map, codec) if self.config.quality_check else None,
        )
        logger.info(
            "kvlab: %s, objects of %d tokens, namespace %s",
            what_is_used(self.config, self.num_slots, slot_bytes, page_map),
            self.chunker.chunk_tokens,
            rank_namespace(self.namespace, self._vllm_config.parallel_config.rank).id,
        )

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._begin_step()

    @never_raise(lambda: None)
    def _begin_step(self) -> None:
        if self.worker is not None and isinstance(self._connector_metadata, StepMetadata):
            self.worker.begin(self._connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self.by_hand is not None:
            self.by_hand.fill()  # an error ends the step: it would read pages without what was written by hand
        if getattr(self._connector_metadata, "loads", None):  # in few steps
            self._start_loads()

    @never_raise(lambda: None)
    def _start_loads(self) -> None:
        if self.worker is not None and isinstance(self._connector_metadata, StepMetadata):
            self.worker.load(self._connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: whole blocks move before or after the forward pass, so CUDA graphs stay full."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing, for the same reason."""

    @never_raise(lambda: None)
    def wait_for_save(self) -> None:
        if self.worker is not None and isinstance(self._connector_metadata, StepMetadata):
            self.worker.save(self._connector_metadata)

    @never_raise(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, (self.worker.take_finished()[0] or None) if self.worker is not None else None

    @never_raise(lambda: compat.TransferResults())
    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """vLLM versions that have it call it in place of `get_finished`; it reports failed loads by request."""
        filled = self.by_hand.take_filled() if self.by_hand is not None else set()
        if self.worker is None or not (self.worker.has_finished or filled):
            return compat.TransferResults()
        finished, failed = self.worker.take_finished()
        finished |= filled
        return compat.TransferResults(
            finished_recving=finished, failed_recving=failed if self.groups.fail_whole else set()
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        lost = self.worker.take_lost_blocks() if self.worker is not None else set()
        return set() if self.groups.fail_whole else lost

    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self.worker.take_report() if self.worker is not None else None

    # ---- metrics

    def get_kv_connector_stats(self) -> KVLabStats | None:
        """The scheduler side's increments; what workers measure reaches it through their reports."""
        return self.scheduler.take_stats() if self.scheduler is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVLabStats:
        return KVLabStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVLabPromMetrics:
        return KVLabPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Tokens of a hit by tier, in vLLM's enumeration (of versions that have one)."""
        sources = compat.hit_sources()
        if self.scheduler is None or sources is None or num_external_tokens == 0:
            return {}
        secondary = min(self.scheduler.secondary_tokens(request.request_id), num_external_tokens)
        disk = all(url.startswith("file:") for url in self.config.secondary_tiers)
        known_secondary = sources.DISK if disk else sources.EXTERNAL_UNSPECIFIED
        counts = {sources.HOST: num_external_tokens - secondary, known_secondary: secondary}
        return {source: count for source, count in counts.items() if count}

    # ---- scheduler

    @property
    def requires_kv_delivery(self) -> bool:
        """False: saves are best effort, a dropped save only causes a later miss."""
        return False

    @never_raise(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self.scheduler is not None
        if self.by_hand is not None and self.by_hand.owns(request):
            self._match = (num_computed_tokens, False)
            served = self.by_hand.match(request, num_computed_tokens)
            return served, bool(served) and self.by_hand.fills_early
        tokens, is_async = self.scheduler.match(request, num_computed_tokens)
        self._match = (num_computed_tokens, is_async)
        return tokens, is_async

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self.scheduler is not None
        block_ids = blocks.get_block_ids()
        self.scheduler.on_allocated(request)
        if self.by_hand is not None and self.by_hand.owns(request):
            self.by_hand.allocated(request, block_ids, self._match[0], num_external_tokens)
            return
        try:
            self.scheduler.allocated(request, block_ids, num_external_tokens)
        except Exception:
            self._hook_failed("update_state_after_alloc")
            if num_external_tokens:  # the engine takes these pages for filled unless told otherwise
                computed, is_async = self._match
                end, block = computed + num_external_tokens, self.chunker.block_tokens
                lost = self.groups.needed(block_ids, range(computed // block, -(-end // block)), end)
                self.scheduler.fail_load(request.request_id, lost, is_async=is_async)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        assert self.scheduler is not None
        return self.scheduler.build(scheduler_output)

    def _load_now(self, loads: list[RequestLoad]) -> set[int]:
        """Called by the scheduler side. With one rank the worker side lives in the same process."""
        try:
            worker: Worker = get_kv_transfer_group().worker
            return worker.load_now(loads)
        except Exception:
            self._hook_failed("load_now")
            return {page for load in loads for op in load.ops for page in op.block_ids} | {
                page for load in loads for page in load.lost_blocks
            }

    @never_raise(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        if self.scheduler is not None and isinstance(report, WorkerReport):
            self.scheduler.absorb(report)

    @never_raise(lambda: (False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self.scheduler is not None
        return False, self.scheduler.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.by_hand is not None:
            self.by_hand.finished(request, block_ids, self.scheduler)
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool | None:
        """vLLM calls it where weights may have changed: from now on, no tier serves what was stored before. False where
        that failed, which turns the cache off, or a request that has not begun holds KV that was."""
        if self.by_hand is not None:
            self.by_hand.reset()
        try:
            if self.scheduler is not None and not self.scheduler.reset():
                return False
        except Exception:
            self._hook_failed("reset_cache")
            return False
        return True

    def shutdown(self) -> None:
        if self.by_hand is not None:
            self.by_hand.has_ended = True
        if self.worker is not None:
            self.worker.close()
        elif self.tiers is not None and self._owns_tiers:
            self.tiers.close()
