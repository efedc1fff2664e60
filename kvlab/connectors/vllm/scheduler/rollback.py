"""Roll back a scheduled step whose KV loads failed, before it runs.

vLLM learns of pages that were not filled only after the step, which is too late: a scheduler that runs ahead has
planned the next step, and the second model runner of vLLM 0.26 counts computed tokens on the GPU, where they are not
corrected ("Recovered from KV load failure", and other tokens than without a cache). So loads within a step are queued
while it is planned. Where one fails, `num_computed_tokens` of every request that would read its pages is lowered to the
valid prefix, and the engine goes on as with a prompt that it computes in chunks.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class _Scheduled:
    """A request that begins, or begins again, with this step: its pages, how many of its tokens they hold, and how to
    lower that number in the step's plan."""

    request_id: str
    pages: list[int]
    num_computed: int
    lower: Callable[[int], None]


class StepRollback:
    """Follows pages that other requests may find in vLLM's prefix cache before they are filled."""

    def __init__(self, block_tokens: int, counters: Counter[str]) -> None:
        self._block_tokens = block_tokens
        self._counters = counters
        self._allocated: dict[str, Any] = {}  # requests with new pages in this step, by id
        # Block id -> (the request that computes it, or None if that one left; its token count from which it is valid).
        self._holes: dict[int, tuple[Any, int]] = {}

    def on_allocated(self, request: Any) -> None:
        """vLLM has allocated pages to `request` for the step that is being planned."""
        self._allocated[request.request_id] = request

    def apply(self, output: Any, lost: Collection[int]) -> None:
        """Pages `lost` are part of this step's hits and were not filled: lower the plan in `output`, and vLLM's request
        objects, for every request that would read them. Raises RuntimeError where vLLM counts otherwise than this
        module expects: a step that reads such pages must not run."""
        requests, self._allocated = self._allocated, {}
        if not lost and not self._holes:
            return
        scheduled = list(_scheduled(output))
        begun = {each.request_id for each in scheduled}
        for page, (owner, end) in list(self._holes.items()):
            if owner is None or owner.request_id in begun:
                self._holes[page] = (None, end)  # it computes other pages now, if any
            elif owner.num_computed_tokens + output.num_scheduled_tokens.get(owner.request_id, 0) >= end:
                del self._holes[page]
        self._holes.update(dict.fromkeys(lost, (None, 0)))
        for source, target in getattr(output, "kv_cache_block_copies", None) or ():
            if source in self._holes:
                self._holes[target] = (None, 0)
        block = self._block_tokens
        for each in scheduled:
            used = each.pages[: -(-each.num_computed // block)]
            first = next((at for at, page in enumerate(used) if page in self._holes), None)
            if first is None:
                continue
            request = requests[each.request_id]
            if request.num_computed_tokens != each.num_computed:
                raise RuntimeError(
                    f"kvlab: cannot roll back a failed load: vLLM counts {request.num_computed_tokens} computed tokens "
                    f"of request {each.request_id} and plans with {each.num_computed}"
                )
            self._lower(each, request, first * block, output)
            for at in range(first, len(used)):
                if used[at] in self._holes:
                    self._holes[used[at]] = (request, min((at + 1) * block, each.num_computed))

    def _lower(self, each: _Scheduled, request: Any, num_computed: int, output: Any) -> None:
        each.lower(num_computed)
        request.num_computed_tokens = num_computed
        drafts = output.scheduled_spec_decode_tokens.pop(each.request_id, ())
        output.num_scheduled_tokens[each.request_id] -= len(drafts)
        output.total_num_scheduled_tokens -= len(drafts)
        self._counters["load_rollbacks"] += 1
        self._counters["rolled_back_tokens"] += each.num_computed - num_computed


def _scheduled(output: Any) -> Iterator[_Scheduled]:
    """The requests that begin, or begin again, with a step."""
    for new in output.scheduled_new_reqs:

        def lower_new(num_computed: int, new: Any = new) -> None:
            new.num_computed_tokens = num_computed

        yield _Scheduled(new.req_id, new.block_ids[0], new.num_computed_tokens, lower_new)
    cached = output.scheduled_cached_reqs
    for at, request_id in enumerate(cached.req_ids):
        if request_id in cached.resumed_req_ids:

            def lower_resumed(num_computed: int, at: int = at) -> None:
                cached.num_computed_tokens[at] = num_computed

            yield _Scheduled(request_id, cached.new_block_ids[at][0], cached.num_computed_tokens[at], lower_resumed)
