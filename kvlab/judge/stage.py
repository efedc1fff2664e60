"""Where a trap plays: an engine that answers, and the book of what it must answer.

A trap runs twice. Without a connector (`Rehearsal`) what it asks is answered and written down; with one (`Stage`) it is
compared. Both return what the book says, so that a trap asks the same both times.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvlab.judge import engine
from kvlab.judge.answers import Answer, Ask, Book, Difference, difference
from kvlab.judge.damage import objects

ENOUGH = 5  # differences, after which a trap asks no more
IDLE_S = 0.001  # between steps that give nothing: an asynchronous load needs the processor too
NOTHING = Answer((), (), ())
Harm = Callable[[Path, list[Path]], None]  # done to one object of a folder; with all of them
_NUMBERS = itertools.count()
Arrivals = Callable[[int], Sequence[Ask] | None]  # number of requests under way -> those that arrive; None at the end


class EnoughError(Exception):
    """What a trap has found will do."""


class HungError(Exception):
    """Requests are under way, and no step gives anything."""


class Stage:
    """An engine with the connector that is judged."""

    is_rehearsal = False

    def __init__(
        self, llm: Any, book: Book, *, adapters: Sequence[str], seed: str, patience_s: float, storage: Path
    ) -> None:
        self.llm, self.book, self.patience_s, self.storage = llm, book, patience_s, storage
        self.rng = random.Random(seed)
        self.adapters = {at: engine.adapter(at, path) for at, path in enumerate(adapters, 1)}
        self.differences: list[Difference] = []
        self.requests = self.loaded_tokens = self.exact = self.exact_of = 0
        self._loaded: dict[str, int] = {}
        self._harm: Harm | None = None
        self._watch_loads()

    # What traps use.

    def ask(self, *asks: Ask, settle: bool = True) -> list[Answer]:
        """All at once, to their ends; what the book says about each. `settle`: saves get a few steps to end in."""
        if len(self.differences) >= ENOUGH:
            raise EnoughError
        arriving = iter([asks])
        self.answer(lambda _: next(arriving, None))
        if settle:
            self.settle()
        return [self.book.answers[ask.key] for ask in asks]

    def first(self, ask: Ask, whose: str) -> None:
        """Ask what has not been asked like this before: tokens that are loaded are those `whose` is told."""
        before = self.loaded_tokens
        self.ask(ask)
        if (loaded := self.loaded_tokens - before) > 0:
            self.fail(f"{loaded} tokens {whose} are loaded", ask.shown)

    def fail(self, what: str, request: str, **more: Any) -> None:
        self.differences.append(Difference(request, what, **more))

    def settle(self) -> None:
        """Steps in which saves may end and be told of: of prompts too short to be loaded."""
        for _ in range(2):
            self._run([Ask((next(_NUMBERS) % 4000, 5), max_tokens=2)], compare=False)
            time.sleep(0.01)

    def overwritten(self) -> Any:
        return engine.overwritten(self.llm)

    def preemptions(self) -> Any:
        return engine.preemptions(self.llm)

    def reset(self, *, connector: bool = False) -> bool:
        """The engine's own prefix cache is emptied, and the connector is told to forget as well."""
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))

    def damage(self, kind: Harm) -> int:
        """`kind` is done to each object of the storage; to how many it was. One may leave meanwhile, as where the
        connector removes what was damaged before."""
        found, count = objects(self.storage), 0
        for path in found:
            with suppress(FileNotFoundError):
                kind(path, found)
                count += 1
        return count

    @contextmanager
    def damaged_after_lookups(self, kind: Harm) -> Iterator[None]:
        """`kind` is done in each step that plans loads: behind the scheduler's lookups, before the worker's loads."""
        self._harm = kind
        try:
            yield
        finally:
            self._harm = None

    def exactly(self, ask: Ask) -> None:
        """Logprobs are those of the engine's own prefix cache, bit for bit, where it had as many tokens."""
        for _ in range(2):
            ((_, got),) = self._run([ask])
            wanted = self.book.exact[ask.key].get(got.cached)
            self.exact_of += 1
            if wanted is not None:
                self.exact += 1
                if list(got.logprobs) != wanted:
                    at = next(i for i, (a, b) in enumerate(zip(got.logprobs, wanted, strict=True)) if a != b)
                    values = {"expected": wanted[at], "got": got.logprobs[at], "loaded": got.loaded}
                    self.fail("logprob, to the bit, of token", ask.shown, at=at, **values)
            self.settle()

    def pages_come_back(self) -> None:
        """When nothing is under way, every page is free again."""
        pool, end = engine.core(self.llm).kv_cache_manager.block_pool, time.monotonic() + self.patience_s
        while (left := pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) and time.monotonic() < end:
            self.settle()
        if left:
            self.fail(f"{left} pages are never given back", "after all requests")

    def answer(self, arrivals: Arrivals) -> None:
        """Traffic: `arrivals` is asked before each step; every answer is compared."""
        for ask, got in self._drive(arrivals):
            wanted = self.book.answers[ask.key]
            if found := difference(ask, got, wanted):
                self.differences.append(found)

    # How.

    def _run(self, asks: Iterable[Ask], *, compare: bool = True) -> list[tuple[Ask, Answer]]:
        arriving = iter([list(asks)])
        answers = list(self._drive(lambda _: next(arriving, None)))
        for ask, got in answers if compare else ():
            if found := difference(ask, got, self.book.answers[ask.key]):
                self.differences.append(found)
        return answers

    def _drive(self, arrivals: Arrivals) -> Iterable[tuple[Ask, Answer]]:
        vllm, ended = self.llm.llm_engine, False
        live: dict[str, Ask] = {}
        patience: dict[str, int] = {}
        heard = time.monotonic()
        while True:
            if not ended:
                arrived = arrivals(len(live))
                ended = arrived is None
                for ask in arrived or ():
                    request_id = f"r{next(_NUMBERS)}"
                    self.requests += 1
                    self._add(request_id, ask)
                    live[request_id] = ask
                    if ask.patience:
                        patience[request_id] = ask.patience
            if ended and not live:
                return
            for request_id in [one for one, steps in patience.items() if steps == 0]:
                if live.pop(request_id, None):
                    vllm.abort_request([request_id])
            patience = {one: steps - 1 for one, steps in patience.items() if steps}
            outputs = vllm.step()
            for output in outputs:
                if output.finished and output.request_id in live:
                    ask = live.pop(output.request_id)
                    for choice in output.outputs:
                        yield ask, self._answer_of(output, choice)
            if outputs:
                heard = time.monotonic()
            elif live and time.monotonic() - heard > self.patience_s:
                raise HungError(
                    f"{len(live)} requests wait and no step gives anything: {next(iter(live.values())).shown}"
                )
            elif live:
                time.sleep(IDLE_S)

    def _add(self, request_id: str, ask: Ask) -> None:
        more = {"n": ask.n, "temperature": 0.7, "top_k": 1} if ask.n > 1 else {}
        if ask.prompt_logprobs:
            more["prompt_logprobs"] = 0
        prompt = {"prompt_token_ids": list(ask.tokens), **({"cache_salt": ask.salt} if ask.salt else {})}
        self.llm.llm_engine.add_request(
            request_id,
            prompt,
            engine.sampling(max_tokens=ask.max_tokens, logprobs=2, **more),
            lora_request=self.adapters.get(ask.adapter),
            priority=ask.priority,
        )

    def _answer_of(self, output: Any, choice: Any) -> Answer:
        logprobs, margins = [], []
        for token, row in zip(choice.token_ids, choice.logprobs or (), strict=False):
            values = sorted((one.logprob for one in row.values()), reverse=True)
            logprobs.append(row[token].logprob)
            margins.append(values[0] - values[1])
        rows = (output.prompt_logprobs or [None])[1:]
        prompt = [next(iter(row.values())).logprob for row in rows if row]
        loaded = max((n for one, n in self._loaded.items() if _is_of(one, output.request_id)), default=0)
        return Answer(list(choice.token_ids), logprobs, margins, prompt, output.num_cached_tokens or 0, loaded)

    def _watch_loads(self) -> None:
        """Note what the connector is told to load, by request; and do harm between that and the loads."""
        connector = engine.core(self.llm).connector
        if connector is None:
            return
        after_alloc, build_meta = connector.update_state_after_alloc, connector.build_connector_meta
        are_planned = False

        def allocated(request: Any, blocks: Any, num_external_tokens: int) -> Any:
            nonlocal are_planned
            if num_external_tokens:
                are_planned = True
                self.loaded_tokens += num_external_tokens
                self._loaded[request.request_id] = num_external_tokens
            return after_alloc(request, blocks, num_external_tokens)

        def built(scheduler_output: Any) -> Any:
            nonlocal are_planned
            meta = build_meta(scheduler_output)
            if are_planned and self._harm is not None:
                self.damage(self._harm)
            are_planned = False
            return meta

        connector.update_state_after_alloc, connector.build_connector_meta = allocated, built


def _is_of(request_id: str, asked: str) -> bool:
    """Whether the engine's request is of the one that was asked: vLLM adds to names, and splits n > 1."""
    return asked in request_id.replace("-", "_").split("_")


class Rehearsal(Stage):
    """An engine without a connector, whose answers are written into the book."""

    is_rehearsal = True

    def ask(self, *asks: Ask, settle: bool = True) -> list[Answer]:
        self._learn(asks)
        return [self.book.answers[ask.key] for ask in asks]

    def first(self, ask: Ask, whose: str) -> None:
        self._learn([ask])

    def fail(self, what: str, request: str, **more: Any) -> None:
        pass

    def settle(self) -> None:
        pass

    def damage(self, kind: Harm) -> int:
        return 0

    def pages_come_back(self) -> None:
        pass

    def exactly(self, ask: Ask) -> None:
        rows = self.book.exact.setdefault(ask.key, {})
        for _ in range(2):
            ((_, got),) = self._run([ask], compare=False)
            rows[got.cached] = list(got.logprobs)
            self.book.answers[ask.key] = got

    def answer(self, arrivals: Arrivals) -> None:
        while (asks := arrivals(0)) is not None:
            self._learn(asks)

    def _learn(self, asks: Sequence[Ask]) -> None:
        longest: dict[str, Ask] = {}
        for ask in asks:
            known = self.book.answers.get(ask.key, NOTHING)
            if len(known.tokens) >= ask.max_tokens and (known.prompt_logprobs or not ask.prompt_logprobs):
                continue
            plain = replace(ask, salt="", n=1, priority=0, patience=0)
            if ask.key not in longest or longest[ask.key].max_tokens < ask.max_tokens or ask.prompt_logprobs:
                longest[ask.key] = plain
        for ask, got in self._run(longest.values(), compare=False):
            self.book.answers[ask.key] = got
