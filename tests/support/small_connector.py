"""A small correct KV connector: pages in a dict of this process or in a folder, loads that end a step later.

Its methods are small, so that `tests.support.mutants` can break one at a time.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

PAGES: dict[str, bytes] = {}


@dataclass
class Meta(KVConnectorMetadata):
    """Loads by request, and saves: pairs of key and block."""

    loads: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    saves: list[tuple[str, int]] = field(default_factory=list)


class Table:
    """What the scheduler side knows of a request."""

    def __init__(self, request):
        self.request, self.blocks, self.computed, self.saved = request, [], 0, set()


class SmallConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            PAGES.clear()  # of the engine before in this process
        self.block = vllm_config.cache_config.block_size
        folder = self._kv_transfer_config.kv_connector_extra_config.get("folder")
        self.folder = Path(folder) if folder else None
        self.tables, self.loads, self.running, self.failed = {}, {}, {}, set()

    @property
    def requires_kv_delivery(self):
        return False

    # Names: a chain of hashes, one for each page; a last page that is not full has a name of its own.

    def root(self, request):
        adapter = request.lora_request.lora_name if request.lora_request else ""
        return repr((request.cache_salt, adapter))

    def link(self, parent, tokens):
        return hashlib.sha256(repr((parent, list(tokens))).encode()).hexdigest()

    def chain(self, request, tokens):
        """Keys of the pages that `tokens` fill, and what the next one's parent is."""
        keys, parent = [], self.root(request)
        for start in range(0, len(tokens) - len(tokens) % self.block, self.block):
            parent = self.link(parent, tokens[start : start + self.block])
            keys.append(parent)
        return keys, parent

    def tail(self, parent, tokens):
        return self.link(parent + " tail", tokens)

    # The store.

    def has(self, key):
        return key in PAGES if self.folder is None else (self.folder / key).exists()

    def put(self, key, data):
        if self.folder is None:
            PAGES[key] = data
        else:
            (self.folder / key).write_bytes(self.seal(key, data) + data)

    def get(self, key):
        if self.folder is None:
            return PAGES[key]
        found = (self.folder / key).read_bytes() if (self.folder / key).exists() else b""
        return found[32:] if self.is_sound(key, found) else None

    def seal(self, key, data):
        return hashlib.sha256(key.encode() + data).digest()

    def is_sound(self, key, found):
        return self.seal(key, found[32:]) == found[:32]

    # The scheduler's side.

    def matches(self, request):
        """Keys of the pages to load, from the first on, and the tokens that they hold."""
        tokens = request.all_token_ids[: request.num_tokens - 1]
        keys, _ = self.chain(request, tokens)
        held = next((at for at, key in enumerate(keys) if not self.has(key)), len(keys))
        parent = keys[held - 1] if held else self.root(request)
        rest = tokens[held * self.block : (held + 1) * self.block]
        for count in range(min(len(rest), self.block - 1), 0, -1):
            if self.has(key := self.tail(parent, rest[:count])):
                return [*keys[:held], key], held * self.block + count
        return keys[:held], held * self.block

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        _, num_tokens = self.matches(request)
        more = max(num_tokens - num_computed_tokens, 0)
        return more, more > 0

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self.tables.setdefault(request.request_id, Table(request))
        if num_external_tokens:
            keys, num_tokens = self.matches(request)
            first = (num_tokens - num_external_tokens) // self.block
            self.loads[request.request_id] = self.plan(keys, list(blocks.get_block_ids()[0]), first)

    def plan(self, keys, blocks, first):
        """Which key goes to which block; those before `first` are in the engine's own cache."""
        return list(zip(keys, blocks, strict=False))[first:]

    def build_connector_meta(self, scheduler_output):
        meta, self.loads = Meta(loads=self.loads), {}
        for new in scheduler_output.scheduled_new_reqs:
            self.place(new.req_id, new.block_ids, new.num_computed_tokens, is_new=True)
        again = scheduler_output.scheduled_cached_reqs
        for name, blocks, computed in zip(again.req_ids, again.new_block_ids, again.num_computed_tokens, strict=True):
            self.place(name, blocks, computed, is_new=name in again.resumed_req_ids)
        for name, count in scheduler_output.num_scheduled_tokens.items():
            table = self.tables[name]
            meta.saves += self.due(table, self.end_of(table, count))
        return meta

    def place(self, name, blocks, computed, *, is_new):
        table = self.tables[name]
        table.computed = computed
        if is_new:
            table.blocks = []
        table.blocks += blocks[0] if blocks else []

    def end_of(self, table, count):
        """Tokens whose KV the step leaves computed."""
        return table.computed + count

    def due(self, table, end):
        tokens = table.request.all_token_ids[:end]
        keys, parent = self.chain(table.request, tokens)
        pages = list(zip(keys, table.blocks, strict=False))
        is_prompt_done = end >= table.request.num_prompt_tokens
        if is_prompt_done and (rest := tokens[len(keys) * self.block : table.request.num_prompt_tokens]):
            pages.append((self.tail(parent, rest), table.blocks[len(keys)]))
        found = [(key, block) for key, block in pages if key not in table.saved]
        table.saved |= {key for key, _ in found}
        return [(key, block) for key, block in found if not self.has(key)]

    def reset_cache(self):
        PAGES.clear()
        for path in self.folder.iterdir() if self.folder else ():
            path.unlink()
        return True

    def request_finished(self, request, block_ids):
        self.tables.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(self, request, block_ids):
        return self.request_finished(request, block_ids[0])

    # The worker's side.

    def register_kv_caches(self, kv_caches):
        self.layers = [kv_caches[name] for name in sorted(kv_caches)]

    def start_load_kv(self, forward_context, **kwargs):
        self.running.update(self._get_connector_metadata().loads)

    def wait_for_layer_load(self, layer_name):
        pass

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        pass

    def wait_for_save(self):
        if self.has_connector_metadata():
            for key, block in self._get_connector_metadata().saves:
                self.put(key, self.read(block))

    def read(self, block):
        return torch.stack([layer[block] for layer in self.layers]).contiguous().numpy().tobytes()

    def write(self, block, data):
        shape, dtype = (len(self.layers), *self.layers[0].shape[1:]), self.layers[0].dtype
        for layer, page in zip(self.layers, torch.frombuffer(bytearray(data), dtype=dtype).view(shape), strict=True):
            layer[block].copy_(page)

    def get_finished(self, finished_req_ids):
        ended, self.running = self.running, {}
        for pages in ended.values():
            self.fetch(pages)
        return None, set(ended) or None

    def fetch(self, pages):
        for key, block in pages:
            data = self.get(key)
            if data is None:
                (self.folder / key).unlink(missing_ok=True)  # or it would be found, and fail, again and again
                self.failed.add(block)
            else:
                self.write(block, data)

    def get_block_ids_with_load_errors(self):
        failed, self.failed = self.failed, set()
        return failed
