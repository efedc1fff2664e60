"""Connectors with one fault each, and the trap that must catch it."""

import os

from tests.support.small_connector import PAGES, SmallConnector

CAUGHT_BY: dict[str, tuple[str, str]] = {}  # class -> (trap, verdict)


def caught_by(trap, verdict="failed"):
    def keep(mutant):
        CAUGHT_BY[mutant.__name__] = (trap, verdict)
        return mutant

    return keep


@caught_by("freed_pages")
class LateSaves(SmallConnector):
    """Pages are read a step after the one that computed them."""

    late = ()

    def wait_for_save(self):
        if self.has_connector_metadata():
            for key, block in self.late:
                self.put(key, self.read(block))
            self.late = self._get_connector_metadata().saves


@caught_by("edges")
class WrongSlot(SmallConnector):
    """Each page but the first goes to the block before its own. (Whole pages that are exchanged are no fault: their
    keys are turned already, and attention does not ask for their order.)"""

    def plan(self, keys, blocks, first):
        return super().plan(keys, [blocks[0], *blocks], first)


@caught_by("forks")
class TailOneLong(SmallConnector):
    """A last page is said to hold one token more than it does."""

    def matches(self, request):
        keys, num_tokens = super().matches(request)
        more = num_tokens % self.block and num_tokens + 1 < request.num_tokens
        return keys, num_tokens + bool(more)


@caught_by("forks")
class TailNamedShort(SmallConnector):
    """A last page is named without its last token."""

    def tail(self, parent, tokens):
        return self.link(f"{parent} tail {len(tokens)}", tokens[:-1])


@caught_by("salts")
class SaltIgnored(SmallConnector):
    def root(self, request):
        return repr(request.lora_request and request.lora_request.lora_name)


@caught_by("lora")
class AdapterIgnored(SmallConnector):
    def root(self, request):
        return repr(request.cache_salt)


@caught_by("lora")
class AdapterOneIsTheBase(SmallConnector):
    """Adapter 1 has the base model's names."""

    def root(self, request):
        adapter = request.lora_request.lora_name if request.lora_request else "adapter-1"
        return repr((request.cache_salt, adapter))


@caught_by("lora")
class SaltIgnoredByAdapters(SmallConnector):
    def root(self, request):
        return repr(request.lora_request.lora_name) if request.lora_request else super().root(request)


@caught_by("resets")
class ResetIgnored(SmallConnector):
    def reset_cache(self):
        return True


@caught_by("resets")
class SavesOutliveReset(SmallConnector):
    """What is read in a step is stored in the next, whatever came between."""

    under_way = ()

    def wait_for_save(self):
        if not self.has_connector_metadata():
            return
        PAGES.update(self.under_way)
        self.under_way = [(key, self.read(block)) for key, block in self._get_connector_metadata().saves]


@caught_by("forks")
class WithoutParent(SmallConnector):
    """A page is named by its own tokens alone."""

    def link(self, parent, tokens):
        return super().link(len(tokens), tokens)


@caught_by("chunked")
class SavedBeforeComputed(SmallConnector):
    """All pages of a prompt are saved in its first step."""

    def end_of(self, table, count):
        end = max(table.request.num_prompt_tokens, super().end_of(table, count))
        return min(end, len(table.blocks) * self.block)


class SavedAtTheEnd(SmallConnector):
    """Pages are saved when their request ends."""

    ended = ()

    def end(self, table):
        raise NotImplementedError

    def request_finished(self, request, block_ids):
        table = self.tables.get(request.request_id)
        if table is not None:
            self.ended = [*self.ended, *self.due(table, min(self.end(table), len(table.blocks) * self.block))]
        return super().request_finished(request, block_ids)

    def build_connector_meta(self, scheduler_output):
        meta = super().build_connector_meta(scheduler_output)
        meta.saves, self.ended = [*self.ended, *meta.saves], ()
        return meta


@caught_by("turns")
class SampledTokenSaved(SavedAtTheEnd):
    """The last token of an answer is saved, which no step has computed."""

    def end(self, table):
        return table.request.num_tokens


@caught_by("aborts")
class StaleAfterAbort(SavedAtTheEnd):
    """The pages of a prompt are saved when its request ends, computed or not."""

    def end(self, table):
        return table.request.num_prompt_tokens


@caught_by("edges")
class LoadsHalf(SmallConnector):
    def fetch(self, pages):
        super().fetch(pages[: (len(pages) + 1) // 2])


@caught_by("edges")
class LayersTurned(SmallConnector):
    """Layers are written in another order than they were read in."""

    def write(self, block, data):
        self.layers.reverse()
        super().write(block, data)
        self.layers.reverse()


@caught_by("edges")
class DoneTooEarly(SmallConnector):
    """A load is reported a step before its pages are written."""

    waiting = ()

    def get_finished(self, finished_req_ids):
        ended, self.running = self.running, {}
        for pages in self.waiting:
            self.fetch(pages)
        self.waiting = list(ended.values())
        return None, set(ended) or None


@caught_by("preemption")
class OldPages(SmallConnector):
    """A request that was preempted and resumed is thought to be in the pages it had."""

    def place(self, name, blocks, computed, *, is_new):
        super().place(name, blocks, computed, is_new=is_new and not self.tables[name].blocks)


@caught_by("prefix_caching")
class FromTheStart(SmallConnector):
    """What the engine's own cache holds is forgotten: the load begins with the first page."""

    def plan(self, keys, blocks, first):
        return list(zip(keys, blocks[first:], strict=False))


@caught_by("freed_pages")
class FirstSaveStays(SmallConnector):
    """A page is saved again with each step, also after its request has ended."""

    kept = ()

    def wait_for_save(self):
        super().wait_for_save()
        if self.has_connector_metadata():
            for key, block in self.kept:
                PAGES[key] = self.read(block)
            self.kept = [*self.kept, *self._get_connector_metadata().saves][-40:]


@caught_by("flipped_objects")
class Unchecked(SmallConnector):
    def is_sound(self, key, found):
        return True


@caught_by("swapped_objects")
class NotNamed(SmallConnector):
    """The checksum is of the content alone, which is right in another's place too."""

    def seal(self, key, data):
        return super().seal("", data)


@caught_by("cut_objects", "crashed")
class CutUnchecked(Unchecked):
    pass


@caught_by("vanishing_objects")
class LostUntold(SmallConnector):
    """What was there once is thought to be there, and what cannot be read is reported as loaded."""

    known = frozenset()

    def has(self, key):
        self.known |= {key} if super().has(key) else set()
        return key in self.known

    def fetch(self, pages):
        super().fetch(pages)
        self.failed.clear()


@caught_by("failing_loads")
class FailedUntold(SmallConnector):
    """What cannot be read is reported as loaded."""

    def fetch(self, pages):
        super().fetch(pages)
        self.failed.clear()


@caught_by("failing_loads")
class FirstFailureUntold(SmallConnector):
    """Of several pages that cannot be read, the last is reported."""

    def fetch(self, pages):
        super().fetch(pages)
        self.failed = {block for _, block in pages[-1:] if block in self.failed}


@caught_by("failing_loads", "hung")
class FailedFoundAgain(SmallConnector):
    """A page that cannot be read stays, and is found, and is not read again."""

    def fetch(self, pages):
        for key, block in pages:
            data = self.get(key)
            if data is None:
                self.failed.add(block)
            else:
                self.write(block, data)


@caught_by("aborts")
class KeepsPages(SmallConnector):
    """The engine is told to wait with freeing the page of a short request, and never told to free it."""

    has_kept = False

    def request_finished(self, request, block_ids):
        super().request_finished(request, block_ids)
        keeps = len(block_ids) == 1 and not self.has_kept
        self.has_kept |= keeps
        return keeps, None


@caught_by("edges", "hung")
class NeverDone(SmallConnector):
    def get_finished(self, finished_req_ids):
        return None, None


@caught_by("edges", "crashed")
class Raises(SmallConnector):
    def start_load_kv(self, forward_context, **kwargs):
        if self._get_connector_metadata().loads:
            raise RuntimeError("planted")


@caught_by("edges", "crashed")
class Dies(SmallConnector):
    def start_load_kv(self, forward_context, **kwargs):
        if self._get_connector_metadata().loads:
            os.abort()


@caught_by("edges", "refused")
class Refuses(SmallConnector):
    def __init__(self, vllm_config, role, kv_cache_config):
        raise ValueError("this connector wants another engine")


@caught_by("edges", "no hits")
class Idle(SmallConnector):
    def has(self, key):
        return False
